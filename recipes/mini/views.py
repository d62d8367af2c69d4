"""The images of the mini backbone: 64-pixel views of package images, rendered text, scenes and textures.

python recipes/mini/views.py CORPUS SUITE OUT: CORPUS is what fetch.sh made, SUITE a folder of tasks in VTAB-1k layout
whose train800 images are used without their labels. A package image that resembles a test image of SUITE is left out.
"""

from __future__ import annotations

import argparse
import gzip
import json
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIZE = 64
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
GENERATED = {"letters": 8000, "words": 5000, "handwriting": 3000, "scenes": 7000, "weaves": 2500}
RESEMBLES = 0.06
"""RMS difference of two 16×16 thumbnails, in units of the full range, below which two images count as one."""
CHUNK = 250
warnings.simplefilter("ignore")
Generator = np.random.Generator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("suite", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = list(_jobs(args.corpus, args.suite, args.seed))
    forbidden = _thumbnails_of_tests(args.suite)
    views, sources, dropped = [], [], 0
    with ProcessPoolExecutor(initializer=_set_fonts, initargs=(_fonts(args.corpus),)) as pool:
        for (source, *_), made in zip(jobs, pool.map(_run, jobs), strict=True):
            if len(made) and source not in GENERATED and source not in ("suite", "dataset-fashion-mnist"):
                close = _resembling(made, forbidden)
                dropped += int(close.sum())
                made = made[~close]
            views.append(made)
            sources += [source] * len(made)
    stacked = np.concatenate(views)
    order = np.random.default_rng(args.seed).permutation(len(stacked))
    np.save(args.out / "views.npy", stacked[order])
    counts = {name: sources.count(name) for name in sorted(set(sources))}
    (args.out / "views.json").write_text(
        json.dumps({"views": len(stacked), "dropped": dropped, "of": counts}, indent=1)
    )
    print(f"{len(stacked)} views, {dropped} dropped because they resemble a test image")


def _jobs(corpus: Path, suite: Path, seed: int) -> Iterator[tuple[str, list[Path], int, int]]:
    """(source, files, views to make of them, seed)."""
    quotas = json.loads(Path(__file__).with_name("sources.json").read_text())
    rng = np.random.default_rng(seed)
    for name, quota in quotas.items():
        root = (
            corpus / "npm/package/img/twitter/64" if name == "emoji-datasource-twitter" else corpus / "packages" / name
        )
        if name == "dataset-fashion-mnist":
            yield name, [next(root.rglob("train-images-idx3-ubyte.gz"))], quota, seed
            continue
        files = sorted(
            p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file() and not p.is_symlink()
        )
        rng.shuffle(files)  # type: ignore[arg-type]
        files = files[:quota]
        for start in range(0, len(files), CHUNK):
            chunk = files[start : start + CHUNK]
            yield name, chunk, round(quota * len(chunk) / len(files)), int(rng.integers(2**31))
    for task in sorted(p for p in suite.iterdir() if (p / "train800.txt").is_file()):
        lines = (task / "train800.txt").read_text().splitlines()
        files = [task / line.rsplit(maxsplit=1)[0] for line in lines]
        for start in range(0, len(files), CHUNK):
            yield "suite", files[start : start + CHUNK], 2 * len(files[start : start + CHUNK]), int(rng.integers(2**31))
    for name, quota in GENERATED.items():
        for _ in range(0, quota, CHUNK):
            yield name, [], CHUNK, int(rng.integers(2**31))


def _run(job: tuple[str, list[Path], int, int]) -> np.ndarray:
    source, files, count, seed = job
    rng = np.random.default_rng(seed)
    if source in GENERATED:
        images = [_MAKERS[source](rng) for _ in range(count)]
    elif source == "dataset-fashion-mnist":
        raw = np.frombuffer(gzip.decompress(files[0].read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28)
        chosen = rng.choice(len(raw), count, replace=False)
        images = [Image.fromarray(raw[i]).resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB") for i in chosen]
    else:
        images = []
        for i, file in enumerate(files):
            times = count * (i + 1) // len(files) - count * i // len(files)
            images += _views_of(file, times, rng, plain=source == "suite")
    return np.stack([np.asarray(image) for image in images]) if images else np.zeros((0, SIZE, SIZE, 3), np.uint8)


def _views_of(file: Path, times: int, rng: Generator, plain: bool) -> list[Image.Image]:
    """`times` views: crops of large images, drawings on white or on a colour. plain: the first one as it is."""
    try:
        with Image.open(file) as opened:
            if max(opened.size) > 8192:
                return []
            opened.draft("RGB", (1024, 1024))
            image = opened.convert("RGBA")
    except Exception:
        return []
    if min(image.size) < 8:
        return []
    if max(image.size) > 1024:
        image.thumbnail((1024, 1024))
    views = []
    for i in range(times):
        if i == 0 and plain:
            view = image
        elif min(image.size) >= 256:
            side = int(min(image.size) * rng.uniform(0.2, 1.0))
            left, top = (int(rng.integers(0, extent - side + 1)) for extent in image.size)
            view = image.crop((left, top, left + side, top + side))
        else:
            view = _jittered(image, rng)
        ground = Image.new("RGBA", view.size, (255, 255, 255, 255) if i == 0 and plain else _ground(rng))
        views.append(Image.alpha_composite(ground, view).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return views


def _jittered(image: Image.Image, rng: Generator) -> Image.Image:
    """The image, padded or cut by up to a fifth on each side."""
    if rng.random() < 0.5:
        return image
    width, height = image.size
    left, right = (int(v * width) for v in rng.uniform(-0.2, 0.15, 2))
    top, bottom = (int(v * height) for v in rng.uniform(-0.2, 0.15, 2))
    return image.crop((left, top, max(left + 4, width - right), max(top + 4, height - bottom)))


def _ground(rng: Generator) -> tuple[int, int, int, int]:
    if rng.random() < 0.6:
        return 255, 255, 255, 255
    return *_colour(rng), 255


def _colour(rng: Generator) -> tuple[int, int, int]:
    red, green, blue = (int(v) for v in rng.integers(0, 256, 3))
    return red, green, blue


# What is drawn ----------------------------------------------------------------------------------------------------

_FONTS: list[str] = []


def _fonts(corpus: Path) -> list[str]:
    return sorted(str(p) for p in (corpus / "fonts").rglob("*") if p.suffix.lower() in (".ttf", ".otf") and p.is_file())


def _set_fonts(fonts: list[str]) -> None:
    _FONTS[:] = fonts


def _font(size: int, rng: Generator) -> ImageFont.FreeTypeFont:
    while True:
        try:
            font = ImageFont.truetype(_FONTS[rng.integers(len(_FONTS))], size)
            if font.getbbox("A") != font.getbbox("g") and font.getbbox("Hg")[2] > size // 3:
                return font
        except OSError:
            continue


def _word(rng: Generator, length: int, alphabet: str) -> str:
    return "".join(alphabet[i] for i in rng.integers(0, len(alphabet), length))


def _write(text: str, size: int, angle: float, ink: tuple[int, int, int], ground: Image.Image, rng: Generator) -> None:
    """Draw text about the middle of `ground`, turned by `angle` degrees."""
    mask = Image.new("L", (3 * SIZE, 3 * SIZE))
    ImageDraw.Draw(mask).text((1.5 * SIZE, 1.5 * SIZE), text, 255, font=_font(size, rng), anchor="mm")
    mask = mask.rotate(angle, Image.Resampling.BICUBIC)
    x, y = (int(SIZE + v) for v in rng.integers(-6, 7, 2))
    ground.paste(ink, (0, 0), mask.crop((x, y, x + SIZE, y + SIZE)))


def _gradient(rng: Generator) -> Image.Image:
    first, second = (np.array(_colour(rng), dtype=np.float64) for _ in range(2))
    if rng.random() < 0.5:
        second = first
    ramp = np.linspace(0, 1, SIZE)[:, None, None] * np.ones((1, SIZE, 1))
    field = first + (second - first) * (ramp if rng.random() < 0.5 else ramp.transpose(1, 0, 2))
    return Image.fromarray(field.astype(np.uint8))


def _noisy(image: Image.Image, rng: Generator) -> Image.Image:
    if rng.random() < 0.4:
        values = np.asarray(image, dtype=np.float64) + rng.normal(0, rng.uniform(2, 20), (SIZE, SIZE, 3))
        image = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.2))) if rng.random() < 0.3 else image


def _letters(rng: Generator) -> Image.Image:
    """One large character, often with others cut off beside it, as on a sign."""
    image = _gradient(rng)
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if rng.random() < 0.6 else "abcdefghijklmnopqrstuvwxyz0123456789"
    text = _word(rng, 1 if rng.random() < 0.3 else 5, alphabet)
    _write(text, int(rng.integers(28, 60)), float(rng.normal(0, 12)), _colour(rng), image, rng)
    return _noisy(image, rng)


def _words(rng: Generator) -> Image.Image:
    """Small words of two, four or five capitals and small letters."""
    image = _gradient(rng)
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if rng.random() < 0.7 else "abcdefghijklmnopqrstuvwxyz"
    text = _word(rng, int(rng.choice([2, 4, 5])), alphabet)
    _write(text, int(rng.integers(12, 26)), float(rng.normal(0, 5)), _colour(rng), image, rng)
    return _noisy(image, rng)


def _handwriting(rng: Generator) -> Image.Image:
    """A digit or small letter in white on black, bent by a smooth random field, at 28 pixels as scanned forms are."""
    image = Image.new("RGB", (SIZE, SIZE))
    character = _word(rng, 1, "0123456789" if rng.random() < 0.8 else "abcdefghijklmnopqrstuvwxyz")
    _write(character, int(rng.integers(40, 64)), float(rng.normal(0, 14)), (255, 255, 255), image, rng)
    coarse = rng.normal(0, 4.5, (2, 4, 4)).astype(np.float32)
    bend = [np.asarray(Image.fromarray(f).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for f in coarse]
    rows, columns = np.mgrid[0:SIZE, 0:SIZE]
    values = np.asarray(image)[
        np.clip(rows + bend[0], 0, SIZE - 1).round().astype(int),
        np.clip(columns + bend[1], 0, SIZE - 1).round().astype(int),
    ]
    small = Image.fromarray(values).filter(ImageFilter.MaxFilter(int(rng.choice([1, 3, 3, 5]))))
    return small.resize((28, 28), Image.Resampling.LANCZOS).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def _scenes(rng: Generator) -> Image.Image:
    """One to nine flat or shaded shapes on a plain, graded or noisy ground."""
    scale = 4
    image = _gradient(rng).resize((SIZE * scale, SIZE * scale))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(1, 10))):
        x, y = rng.uniform(0, SIZE * scale, 2)
        radius = rng.uniform(3, 16) * scale
        colour = _colour(rng)
        sides = int(rng.choice([2, 3, 4, 5, 6, 12]))
        if sides == 2:  # a ball: discs of growing brightness
            for step in range(8):
                r = radius * (1 - step / 8)
                lit = tuple(min(255, int(v * (0.5 + 0.08 * step) + 6 * step)) for v in colour)
                draw.ellipse((x - r - step, y - r - step, x + r - step, y + r - step), fill=lit)
            continue
        angles = rng.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(sides) / sides
        stretch = rng.uniform(0.4, 1.0)
        turn = rng.uniform(0, np.pi)
        u, v = radius * np.cos(angles), radius * stretch * np.sin(angles)
        corners = zip(x + u * np.cos(turn) - v * np.sin(turn), y + u * np.sin(turn) + v * np.cos(turn), strict=True)
        draw.polygon([(float(a), float(b)) for a, b in corners], fill=colour)
    return _noisy(image.resize((SIZE, SIZE), Image.Resampling.LANCZOS), rng)


def _weaves(rng: Generator) -> Image.Image:
    """Oriented noise and crossed stripes in grey or one colour, some with a patch out of step: cloth with a fault."""
    rows, columns = np.mgrid[0:SIZE, 0:SIZE]
    angle = rng.uniform(0, np.pi)
    along = rows * np.cos(angle) + columns * np.sin(angle)
    across = columns * np.cos(angle) - rows * np.sin(angle)
    if rng.random() < 0.5:
        values = np.sin(along * rng.uniform(0.3, 2)) * np.sin(across * rng.uniform(0.05, 2))
    else:
        noise = rng.normal(size=(SIZE, SIZE))
        spectrum = np.exp(-((along - SIZE / 2) ** 2) / rng.uniform(2, 40) - (across % SIZE) ** 2 / rng.uniform(40, 900))
        values = np.fft.ifft2(np.fft.fft2(noise) * np.abs(np.fft.fft2(spectrum))).real
    values = values + rng.normal(0, rng.uniform(0, 0.5) * values.std() + 1e-6, values.shape)
    if rng.random() < 0.5:
        x, y, w, h = (int(v) for v in (*rng.integers(0, 48, 2), *rng.integers(4, 30, 2)))
        values[y : y + h, x : x + w] = np.roll(values, 5, 0)[y : y + h, x : x + w].T.mean() * rng.uniform(
            -1, 1
        ) + values[y : y + h, x : x + w] * rng.uniform(0.2, 1.5)
    values = (values - values.min()) / (np.ptp(values) + 1e-9)
    ink = np.ones(3) if rng.random() < 0.7 else rng.uniform(0.3, 1, 3)
    return Image.fromarray((255 * values[..., None] * ink).astype(np.uint8))


_MAKERS: dict[str, Callable[[Generator], Image.Image]] = {
    "letters": _letters,
    "words": _words,
    "handwriting": _handwriting,
    "scenes": _scenes,
    "weaves": _weaves,
}

# What must stay out -------------------------------------------------------------------------------------------------


def _thumbnails(images: np.ndarray) -> np.ndarray:
    n = len(images)
    blocks = images.reshape(n, 16, SIZE // 16, 16, SIZE // 16, 3).astype(np.float32) / 255
    return blocks.mean((2, 4)).reshape(n, -1)


def _thumbnails_of_tests(suite: Path) -> np.ndarray:
    thumbnails = []
    for task in sorted(p for p in suite.iterdir() if (p / "test.txt").is_file()):
        images = []
        for line in (task / "test.txt").read_text().splitlines():
            with Image.open(task / line.rsplit(maxsplit=1)[0]) as image:
                images.append(np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)))
        thumbnails.append(_thumbnails(np.stack(images)))
    return np.concatenate(thumbnails)


def _resembling(images: np.ndarray, forbidden: np.ndarray) -> np.ndarray:
    """Which images have a thumbnail within RESEMBLES of a forbidden one."""
    mine = _thumbnails(images)
    square = (mine**2).sum(1)[:, None] + (forbidden**2).sum(1) - 2 * mine @ forbidden.T
    return square.min(1) < RESEMBLES**2 * mine.shape[1]


if __name__ == "__main__":
    main()
