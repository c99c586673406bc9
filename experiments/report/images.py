"""Figures of a report: smaller copies of the PNG files of experiments, inside the page or beside it."""

import base64
import io
import pathlib
from typing import Protocol

from PIL import Image

from rebasin.files import write_whole

__all__ = ["Beside", "Images", "Inline", "small_png"]

# Largest width in pixels and number of colours. Inside a page figures are sharp on a screen with two pixels
# to the point. Beside it they are to be small, since they are committed with the documentation.
_INLINE, _BESIDE = (1400, 96), (860, 32)


class Images(Protocol):
    """Where the figures of a page are."""

    def source(self, path: pathlib.Path) -> str:
        """Return what the page writes as the source of a figure."""
        ...


class Inline:
    """Figures as data in the page, which is then one file that needs no other."""

    def source(self, path: pathlib.Path) -> str:
        """Return the figure as a ``data:`` address."""
        return f"data:image/png;base64,{base64.b64encode(small_png(path, *_INLINE)).decode()}"


class Beside:
    """Figures as files in a folder beside the page.

    Args:
      folder: the folder of the page; figures go to its folder ``figures``.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder / "figures"
        self.names: set[str] = set()

    def source(self, path: pathlib.Path) -> str:
        """Write a smaller copy of the figure, and return its name relative to the page."""
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"{path.parent.name}_{path.name}"
        write_whole(self._folder / name, small_png(path, *_BESIDE))
        self.names.add(name)
        return f"figures/{name}"

    def tidy(self) -> None:
        """Delete figures of an earlier report that are not among those of this one."""
        for path in self._folder.glob("*.png"):
            if path.name not in self.names:
                path.unlink()


def small_png(path: pathlib.Path, width: int, colours: int) -> bytes:
    """Return a PNG of at most so many pixels' width and so many colours."""
    with Image.open(path) as image:
        image = image.convert("RGB")
        if image.width > width:
            height = round(image.height * width / image.width)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        few = image.quantize(colours, dither=Image.Dither.NONE)
    written = io.BytesIO()
    few.save(written, "png", optimize=True)
    return written.getvalue()
