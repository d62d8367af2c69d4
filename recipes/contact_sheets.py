"""Draw the contact sheets of the procedural tasks: python recipes/contact_sheets.py docs/images

Two images of each class, under the class's name.
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure

from hgprompt.data import PROCEDURAL_TASKS, render_task


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images")
    for name, task in PROCEDURAL_TASKS.items():
        classes = len(task.class_names)
        columns = min(classes, 9)
        rows = -(-classes // columns)
        images = render_task(name, 2 * classes, image_size=96, seed=0)
        figure = Figure(figsize=(1.15 * columns, 2.5 * rows), layout="constrained")
        axes = figure.subplots(2 * rows, columns, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for label, title in enumerate(task.class_names):
            for copy, i in enumerate((images.labels == label).nonzero().flatten().tolist()):
                axis = axes[2 * (label // columns) + copy, label % columns]
                axis.imshow(images.images[i].permute(1, 2, 0).numpy())
                if copy == 0:
                    axis.set_title(f"{label}: {title}", fontsize=8)
        figure.savefig(folder / f"{name}.png", dpi=100)


if __name__ == "__main__":
    main()
