"""What else could be asked of prompts: transferability metrics beside the H-score, and alternatives to Eq. 10."""

from hgprompt.transferability.metrics import leep, log_me, nce, trace_ratio, transrate

__all__ = ["leep", "log_me", "nce", "trace_ratio", "transrate"]
