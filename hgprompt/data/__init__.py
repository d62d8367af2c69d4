"""Labelled images: folders on disk, decoded images in memory, and procedural tasks."""

from hgprompt.data.folders import ImageDataset, decode, make_loader, open_images
from hgprompt.data.images import LabelledImages
from hgprompt.data.listing import ImageTask, load_task
from hgprompt.data.procedural import PROCEDURAL_TASKS, ProceduralTask, render_task

__all__ = [
    "PROCEDURAL_TASKS",
    "ImageDataset",
    "ImageTask",
    "LabelledImages",
    "ProceduralTask",
    "decode",
    "load_task",
    "make_loader",
    "open_images",
    "render_task",
]
