"""Labelled images on disk."""

from hgprompt.data.folders import ImageDataset, ImageTask, load_task, make_loader

__all__ = ["ImageDataset", "ImageTask", "load_task", "make_loader"]
