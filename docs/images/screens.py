"""Draws what a terminal shows of the demo's training: while it runs at 80 columns, and when it has ended at 120.

python docs/images/screens.py FOLDER
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

import pyte
from PIL import Image, ImageDraw, ImageFont

TRAIN = "import sys; from torch_frame.cli.demo import train; train(sys.argv[1], int(sys.argv[2]))"
BACKGROUND, FOREGROUND = (24, 26, 31), (220, 223, 228)
COLORS = {"green": (152, 195, 121), "brown": (229, 192, 123), "red": (224, 108, 117)}
FONTS = ["/usr/share/fonts/truetype/dejavu/DejaVuSansMono", "/Library/Fonts/DejaVuSansMono", "DejaVuSansMono"]


def screen_of(command: list[str], columns: int, rows: int, until: str | None) -> pyte.Screen:
    """The screen of a terminal in which a command has run.

    Args:
        command: the words.
        columns, rows: of the terminal.
        until: the command is killed when a line matches this; None: it ends by itself.
    """
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    unwanted = ("NO_COLOR", "FORCE_COLOR", "COLUMNS")
    environment = {name: value for name, value in os.environ.items() if name not in unwanted}
    environment["TERM"] = "xterm-256color"
    process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=environment)
    os.close(child)
    screen = pyte.Screen(columns, rows)
    stream = pyte.ByteStream(screen)
    while True:
        if not select.select([parent], [], [], 0.1)[0]:
            continue
        try:
            sent = os.read(parent, 4096)
        except OSError:
            break
        stream.feed(sent)
        if until is not None and any(re.match(until, line) for line in screen.display):
            process.kill()
            break
    process.wait()
    return screen


def picture_of(screen: pyte.Screen) -> Image.Image:
    """The screen's text, as far as it is written on."""
    plain, bold = (_font(style) for style in ("", "-Bold"))
    width, height = plain.getlength("M"), 19
    used = max(number for number, line in enumerate(screen.display) if line.strip()) + 1
    image = Image.new("RGB", (int(screen.columns * width) + 24, used * height + 20), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for row in range(used):
        for column in range(screen.columns):
            cell = screen.buffer[row][column]
            if cell.data.strip():
                at, font = (12 + column * width, 10 + row * height), bold if cell.bold else plain
                draw.text(at, cell.data, font=font, fill=COLORS.get(cell.fg, FOREGROUND))
    return image.quantize(128, dither=Image.Dither.NONE)


def _font(style: str) -> ImageFont.FreeTypeFont:
    for name in FONTS:
        try:
            return ImageFont.truetype(f"{name}{style}.ttf", 15)
        except OSError:
            continue
    raise SystemExit("The font DejaVu Sans Mono is not installed. On Debian: apt-get install fonts-dejavu-core")


def main() -> None:
    folder = Path(sys.argv[1])
    for name, columns, epochs, until in (("running", 80, 20, r"epoch 8/20: +[4-9]\d%"), ("finished", 120, 12, None)):
        with tempfile.TemporaryDirectory(prefix="digits_") as parent:
            command = [sys.executable, "-c", TRAIN, os.path.join(parent, "run"), str(epochs)]
            picture_of(screen_of(command, columns, 50, until)).save(folder / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
