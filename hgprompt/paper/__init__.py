"""The paper's experiments on any tasks in VTAB-1k's folder format."""

from hgprompt.paper.bench import method_names
from hgprompt.paper.cells import Cell, Share, Store, Work, run_cells
from hgprompt.paper.experiments import EXPERIMENTS, Experiment, Request, make_request
from hgprompt.paper.lab import Lab, Plan
from hgprompt.paper.tasks import VTAB, Suite, TaskFolder, VtabTask, check_task, find_suite

__all__ = [
    "EXPERIMENTS", "VTAB", "Cell", "Experiment", "Lab", "Plan", "Request", "Share", "Store", "Suite", "TaskFolder",
    "VtabTask", "Work", "check_task", "find_suite", "make_request", "method_names", "run_cells",
]  # fmt: skip
