"""What a VM's screen shows, as a picture."""

from __future__ import annotations

import io
from pathlib import Path


class Screenshot:
    """A picture of a screen; notebooks show it, `save` keeps it.

    Attributes:
        png: the picture as PNG.
        size: width and height in pixels.
    """

    def __init__(self, machine: str, data: bytes) -> None:
        # Pillow is heavy to load, and most programs take no screenshot.
        from PIL import Image

        with Image.open(io.BytesIO(data)) as picture:
            self.size = picture.size
            buffer = io.BytesIO()
            picture.convert("RGB").save(buffer, "PNG", optimize=True)
        self.machine = machine
        self.png = buffer.getvalue()

    def save(self, path: str | Path) -> Path:
        """Write the PNG to a host file."""
        target = Path(path)
        target.write_bytes(self.png)
        return target

    def __repr__(self) -> str:
        return f"<Screenshot of {self.machine}, {self.size[0]} x {self.size[1]} pixels>"

    def _repr_mimebundle_(self, **_: object) -> tuple[dict[str, object], dict[str, object]]:
        alt = f"The screen of {self.machine}"
        return {"image/png": self.png, "text/plain": repr(self)}, {"image/png": {"alt": alt}}
