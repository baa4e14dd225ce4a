"""Draw figures/network.png, an overview of the method.

python figures/network.py
"""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle

HERE = Path(__file__).resolve().parent
FROZEN, TRAINED, PLAIN = '#D6E4F0', '#FBE3D6', '#F2F2F2'
BASE, NOVEL, BACKGROUND, INK = '#2C6FAC', '#D1495B', '#5F6B6D', '#222222'


class Canvas:
    """Axes for boxes, arrows and text; the unit is a tenth of an inch."""

    def __init__(self, width: float, height: float):
        self.figure = Figure(figsize=(width / 10, height / 10))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height))
        self.axes.set_axis_off()

    def text(self, x: float, y: float, text: str, size: float = 11, color: str = INK, **style):
        """Text whose centre is (x, y) unless the style says otherwise."""
        style = {'ha': 'center', 'va': 'center'} | style
        self.axes.text(x, y, text, fontsize=size, color=color, **style)

    def box(
        self, x: float, y: float, width: float, height: float, text: str,
        fill: str = PLAIN, edge: str = INK, size: float = 11,
    ):  # fmt: skip
        """A rounded box with text; (x, y) is its lower left corner."""
        shape = FancyBboxPatch(
            (x, y), width, height, boxstyle='round,pad=0,rounding_size=0.8', facecolor=fill, edgecolor=edge,
            linewidth=1.3,
        )  # fmt: skip
        self.axes.add_patch(shape)
        self.text(x + width / 2, y + height / 2, text, size)

    def arrow(self, start: tuple[float, float], end: tuple[float, float], color: str = INK):
        """A straight arrow."""
        self.axes.add_patch(
            FancyArrowPatch(
                start, end, arrowstyle='-|>', mutation_scale=13, color=color, linewidth=1.5, shrinkA=0, shrinkB=0
            )
        )  # fmt: skip

    def line(self, *points: tuple[float, float], color: str = INK):
        """A line through points."""
        self.axes.plot(*zip(*points, strict=True), color=color, linewidth=1.5)

    def stack(self, x: float, y: float, text: str, color: str):
        """A stack of feature maps, 7 wide and 8 high; (x, y) is its lower left corner."""
        for i in (2, 1, 0):
            self.axes.add_patch(
                Rectangle((x + i, y + i), 5, 6, facecolor='white', edgecolor=color, linewidth=1.4, zorder=3 - i)
            )
        self.text(x + 2.5, y + 3, text, 11, color, zorder=5)


def draw() -> Figure:
    canvas = Canvas(124, 61)
    draw_features(canvas)
    draw_decomposition(canvas)
    draw_classifiers(canvas)
    draw_stages(canvas)
    return canvas.figure


def draw_features(c: Canvas):
    """Image, backbone, decoder and features."""
    c.axes.add_patch(Polygon([(3, 20), (11, 20), (11, 32), (3, 32)], facecolor='white', edgecolor=INK, linewidth=1.3))
    c.axes.add_patch(Polygon([(3, 20), (6.5, 27), (8.5, 23.5), (9.3, 25), (11, 20)], facecolor='#B9C7B4'))
    c.axes.add_patch(Rectangle((3, 20), 8, 12, fill=False, edgecolor=INK, linewidth=1.3))
    c.text(7, 17.6, 'image')
    c.box(15, 20.5, 11, 11, 'backbone\n(ResNet-50)', FROZEN)
    c.box(29.5, 20.5, 11, 11, 'decoder\n(PSP)', FROZEN)
    c.arrow((11, 26), (15, 26))
    c.arrow((26, 26), (29.5, 26))
    c.arrow((40.5, 26), (45, 26))
    c.stack(45, 22, '$q$', INK)
    c.text(48.5, 19.4, 'features\n$C \\times h \\times w$', 10, va='top')


def draw_decomposition(c: Canvas):
    """Features to components on base and novel prototypes, and the residual."""
    c.axes.add_patch(
        FancyBboxPatch((55.5, 3), 27.5, 54.5, boxstyle='round,pad=0,rounding_size=1', facecolor='white',
                       edgecolor='#999999', linewidth=1.2, linestyle=(0, (4, 3)), zorder=0)
    )  # fmt: skip
    c.text(69.2, 55.2, 'orthogonal decomposition', 12, weight='bold')
    rows = (
        (45, BASE, FROZEN, 'base prototypes\n$s_1 \\ldots s_{K_b}$', '$q_k$', '$q_k = \\langle s_k, q\\rangle\\, s_k$'),
        (24, NOVEL, TRAINED, 'novel prototypes\n$s_{K_b+1} \\ldots s_{K_b+K_n}$', '$q_j$',
         '$q_j = \\langle s_j, q\\rangle\\, s_j$'),
    )  # fmt: skip
    for y, color, fill, name, symbol, formula in rows:
        c.box(57, y - 4, 14, 8, name, fill, color, 10)
        c.arrow((71, y), (73.5, y), color)
        c.stack(73.5, y - 4, symbol, color)
        c.text(69.2, y + 6, formula, 11, color)
    c.text(69.2, 35.4, 'a loss keeps all prototypes\northogonal: $\\langle s_i, s_j\\rangle \\to 0$', 9.5, '#555555')
    c.stack(73.5, 5.5, '$r$', BACKGROUND)
    c.box(57, 5.5, 14, 8, 'residual', 'white', BACKGROUND, 10)
    c.arrow((71, 9.5), (73.5, 9.5), BACKGROUND)
    c.text(69.2, 16, '$r = q - \\sum_k q_k - \\sum_j q_j$', 11, BACKGROUND)
    c.line((53, 26), (54.2, 26))
    c.line((54.2, 9.5), (54.2, 45))
    for y in (9.5, 24, 45):
        c.arrow((54.2, y), (57, y))


def draw_classifiers(c: Canvas):
    """Components to logits, and logits to labels."""
    c.box(88, 41, 12, 8, 'classifier\n$\\varphi$', FROZEN)
    c.box(88, 13.75, 12, 8, 'classifier\n$\\varphi_n$', TRAINED)
    c.arrow((80.5, 45), (88, 45), BASE)
    c.arrow((80.5, 24), (88, 19.3), NOVEL)
    c.arrow((80.5, 9.5), (88, 15.7), BACKGROUND)
    for y, color, name in ((45, BASE, 'base logits'), (21, NOVEL, 'novel logits'), (14.5, BACKGROUND, 'background')):
        c.arrow((100, y), (104.5, y), color)
        c.box(104.5, y - 2.6, 15.5, 5.2, name, 'white', color, 10.5)
    c.text(112.3, 33, 'argmax over all:\nsegmentation', 11)
    c.arrow((112.3, 42.2), (112.3, 35.6), BASE)
    c.arrow((112.3, 23.8), (112.3, 30.4), NOVEL)
    c.line((120, 14.5), (121.8, 14.5), (121.8, 33), color=BACKGROUND)
    c.arrow((121.8, 33), (119, 33), BACKGROUND)


def draw_stages(c: Canvas):
    """Legend: which stage learns what."""
    c.box(3, 52.5, 4, 3.2, '', FROZEN)
    c.text(8.3, 54.1, 'learned in stage 1 (base classes), frozen in stage 2', 10.5, ha='left')
    c.box(3, 47.3, 4, 3.2, '', TRAINED)
    c.text(8.3, 48.9, 'learned in stage 2 from 1, 5 or 10 images\nof each novel class', 10.5, ha='left', va='center')
    stage_1 = (
        'In stage 1 there are no novel prototypes,\nand $\\varphi$ scores the background too; $\\varphi_n$ starts\n'
        'from $\\varphi$.'
    )
    c.text(3, 41, stage_1, 10, '#555555', ha='left')


if __name__ == '__main__':
    draw().savefig(HERE / 'network.png', dpi=110)
