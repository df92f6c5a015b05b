"""How all figures look, and how they are saved.

They are drawn through matplotlib's object interface on the Agg canvas: no window, no global state. Import the modules
that draw where a picture is due, not with the library: matplotlib takes a second to load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hilora.files import PathLike, atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW = "#CC79A7", "#56B4E9", "#F0E442"
PALETTE = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW)
GREY = "#666666"
HEAT = "YlGnBu"


def new_figure(width: float, height: float, title: str = "", size: float = 12) -> Figure:
    """An empty figure, in inches, with a title of so many points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=size)
    return figure


def grid(axes: Axes, axis: Any) -> None:
    """Thin lines across one axis, `"x"` or `"y"`, behind what is drawn."""
    axes.grid(axis=axis, color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)


def open_frame(axes: Axes) -> None:
    """No lines at the top and to the right."""
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: PathLike) -> None:
    """As a PNG, whole or not at all; the same figure is the same file under every version of matplotlib."""
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
