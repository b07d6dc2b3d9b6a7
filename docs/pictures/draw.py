"""The pictures of docs/concepts.md, as SVG: `python docs/pictures/draw.py`. `docs/step.svg` was drawn by hand."""

from pathlib import Path
from xml.sax.saxutils import escape

INK, SOFT, BLUE, RED, GREEN, AMBER = "#222233", "#556677", "#1f6f8b", "#b4555a", "#2b7a55", "#a8741a"
FILL = {BLUE: "#e8f1f5", RED: "#fbeeee", GREEN: "#e9f5ee", AMBER: "#fbf4e4", SOFT: "#f2f4f6"}


class Picture:
    """Boxes, arrows and words on white, so that it reads on a dark page too."""

    def __init__(self, width, height, title):
        self.width, self.height = width, height
        self.parts = [f'<rect width="{width}" height="{height}" fill="#ffffff"/>']
        self.text(24, 34, title, size=19, bold=True, at="start")

    def text(self, x, y, words, *, size=13, bold=False, colour=INK, at="middle"):
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x}" y="{y}" text-anchor="{at}" font-size="{size}"{weight} fill="{colour}">{escape(words)}</text>'
        )

    def box(self, x, y, w, h, *lines, colour=BLUE, bold=True):
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="6" fill="{FILL[colour]}" stroke="{colour}" '
            'stroke-width="1.4"/>'
        )
        top = y + h / 2 - 8 * (len(lines) - 1) + 5
        for place, line in enumerate(lines):
            self.text(x + w / 2, top + 16 * place, line, bold=bold and place == 0, size=13 if place == 0 else 12)

    def arrow(self, x1, y1, x2, y2, *, colour=INK, dashed=False):
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<path d="M{x1} {y1} L{x2} {y2}" stroke="{colour}" stroke-width="1.5" fill="none" '
            f'marker-end="url(#a)"{dash}/>'
        )

    def line(self, x1, y1, x2, y2, *, colour=SOFT, dashed=False):
        dash = ' stroke-dasharray="4 4"' if dashed else ""
        self.parts.append(f'<path d="M{x1} {y1} L{x2} {y2}" stroke="{colour}" stroke-width="1.2"{dash}/>')

    def write(self, name):
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            'font-family="Helvetica, Arial, sans-serif"><defs><marker id="a" viewBox="0 0 10 10" refX="9" refY="5" '
            'markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0 L10 5 L0 10 z" fill="#444455"/></marker></defs>'
        )
        Path(__file__).with_name(name).write_text("\n".join([head, *self.parts, "</svg>"]) + "\n")


def chunks():
    p = Picture(1000, 380, "Chunks: the same sums on any number of devices")
    p.text(24, 70, "the sample of step t, in an order drawn for the step", colour=SOFT, at="start")
    order = [7, 31, 2, 90, 55, 13, 4, 68, 21, 77, 39, 60, 18]
    for place, unit in enumerate(order):
        p.box(24 + 72 * place, 84, 62, 34, str(unit), colour=[BLUE, GREEN, AMBER, RED][place // 4], bold=False)
    p.text(24, 152, "cut into chunks of p = 4, by place alone; the last is filled up", colour=SOFT, at="start")
    for chunk, colour in enumerate((BLUE, GREEN, AMBER, RED)):
        p.box(24 + 240 * chunk, 166, 210, 40, f"chunk {chunk}", "one product, one rounding", colour=colour)
    p.text(24, 242, "1 process, 1 device:   0, 1, 2, 3", at="start")
    p.text(24, 266, "2 nodes, 4 devices:     0 | 1 | 2 | 3", at="start")
    p.text(24, 290, "after a dead node, 3:    0, 3 | 1 | 2", at="start")
    for chunk in range(4):
        x, y = (690, 262) if chunk < 3 else (833, 234)
        p.arrow(129 + 240 * chunk, 206, x, y, colour=SOFT, dashed=True)
    p.box(690, 236, 286, 60, "R: 64-bit integers", "added in any order, the same bits", colour=BLUE)
    p.text(
        24,
        340,
        "One unit taken out moves two chunks at most: its own, and that of the last one, which takes its place.",
        at="start",
    )
    p.text(24, 362, "In sorted order it would move all that come after it.", colour=SOFT, at="start")
    p.write("chunks.svg")


def ledger():
    p = Picture(1000, 400, "The ledger: charged before it runs, shown after it is saved")
    p.arrow(60, 200, 970, 200, colour=SOFT)
    p.text(40, 222, "time", colour=SOFT, at="start")
    stations = [
        (40, "reserve", ("steps 0 to 19:", "appended, fsynced"), RED),
        (200, "take", ("samples and noise", "of the nonce"), BLUE),
        (360, "save", ("checkpoint 20,", "noted in the ledger"), GREEN),
        (520, "show", ("its test metrics,", "its parameters"), GREEN),
        (680, "reserve", ("steps 20 to 39", ""), RED),
        (840, "take", ("steps 20 to 31", ""), BLUE),
    ]
    for x, name, lines, colour in stations:
        p.box(x, 120, 130, 66, name, *[line for line in lines if line], colour=colour)
    p.text(905, 232, "killed here", colour=RED, bold=True)
    p.line(905, 186, 905, 216, colour=RED)
    p.box(
        40,
        262,
        440,
        58,
        "the same again",
        "from checkpoint 20: same nonce, same samples, same noise;",
        "nothing of steps 20 to 31 was seen: not charged again",
        colour=BLUE,
    )
    p.box(
        520,
        262,
        440,
        58,
        "something changed, or an older checkpoint",
        "a new incarnation: fresh nonce, fresh noise;",
        "what was charged stays charged",
        colour=RED,
    )
    p.text(
        24,
        72,
        "ledger.jsonl holds the set of (incarnation, step) that may ever be seen: what epsilon is computed from.",
        at="start",
    )
    p.text(24, 94, "Only process 0 writes it, and no step ends without process 0.", colour=SOFT, at="start")
    p.text(
        24,
        352,
        "A crash between any two of these leaves either a charge without a result, or a result that is charged and saved:",
        at="start",
    )
    p.text(24, 374, "never a result without a charge.", bold=True, at="start")
    p.write("ledger.svg")


def keys():
    p = Picture(1000, 400, "The keys: all randomness from one secret, on every process")
    p.box(24, 150, 190, 70, "secret", "32 bytes, private/secret.key", "never sent, never logged", colour=RED)
    p.box(24, 262, 190, 52, "nonce", "public, one an incarnation", colour=AMBER)
    p.box(24, 332, 190, 40, "step t", colour=SOFT)
    p.box(300, 190, 170, 70, "BLAKE2b", "keyed by the secret", colour=BLUE)
    p.arrow(214, 185, 300, 215)
    p.arrow(214, 288, 300, 240)
    p.arrow(214, 352, 320, 260)
    rows = [
        (70, "sampling", "Philox, 64-bit words", "who is in the step"),
        (150, "order", "Philox", "which units share a product"),
        (230, "noise, each block", "Threefry, three normals", "integers on the grid, once"),
        (310, "loss", "Threefry, folded with i", "dropout, augmentation"),
    ]
    for y, name, how, what in rows:
        p.box(560, y, 190, 52, name, how, colour=BLUE)
        p.arrow(470, 225, 560, y + 26)
        p.arrow(750, y + 26, 790, y + 26)
        p.text(798, y + 31, what, at="start")
    p.text(24, 72, "No key depends on ranks, nodes or devices.", at="start")
    p.text(24, 94, "So two ranks agree without a message,", colour=SOFT, at="start")
    p.text(24, 112, "and a resumed run draws the same again.", colour=SOFT, at="start")
    p.write("keys.svg")


def grid():
    p = Picture(1000, 400, "The grid: what is released is an integer, times a public power of two")
    p.text(
        24,
        72,
        "float32 sums of products are rounded to multiples of g; all that follows, up to the noise, is exact",
        at="start",
    )
    for place in range(25):
        x = 60 + 36 * place
        p.line(x, 150, x, 170 if place % 4 else 178)
    p.line(40, 150, 960, 150)
    p.text(962, 140, "R / g", colour=SOFT, at="end")
    for x, name, colour in ((312, "with unit i", BLUE), (528, "without", GREEN)):
        p.parts.append(f'<circle cx="{x}" cy="150" r="7" fill="{colour}"/>')
        p.text(x, 124, name, colour=colour, bold=True)
    p.arrow(320, 196, 520, 196, colour=SOFT)
    p.arrow(520, 196, 320, 196, colour=SOFT)
    p.text(420, 216, "at most C (1 + rho) / g", size=13)
    for centre, colour in ((312, BLUE), (528, GREEN)):
        points = []
        for step in range(-60, 61):
            z = step / 20
            points.append(f"{centre + 100 * z:.1f},{318 - 70 * 2.718281828 ** (-z * z / 2):.1f}")
        p.parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2"/>')
    p.line(40, 318, 960, 318)
    p.text(660, 196, "plus round(Z1) + round(Z2) + round(Z3):", at="start")
    p.text(660, 216, "every integer can come out in both worlds,", at="start")
    p.text(660, 236, "with the probability that it should have", at="start")
    p.text(
        24,
        352,
        "A float32 draw that is scaled leaves up to 14% of the float32 numbers impossible: seeing one tells that the unit was there.",
        at="start",
    )
    p.text(24, 374, "In integers there is no such number, and no order of addition.", colour=SOFT, at="start")
    p.write("grid.svg")


for draw in (chunks, ledger, keys, grid):
    draw()
