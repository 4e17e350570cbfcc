"""What a recipe would take, before anything is computed."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from posttrain import doctor
from posttrain.graph import ordered, stage_inputs, until_stage
from posttrain.machine import fast_bf16, matmul_speed
from posttrain.runner import say
from posttrain.stages import Recipe

EFFICIENCY = 0.5
"""Share of the measured matrix-product speed that training reaches, for forecasts."""


def dry_run(recipe: Recipe, *, until: str | None = None, console: Console | None = None, tiny: bool = False) -> None:
    """Print the stages with forecasts of time and memory; loads no model, reads no data.

    minutes = flops / (`EFFICIENCY` x speed of a matrix product measured here, in fp32, twice that with bf16 instructions) / 60
    """
    console = console or Console()
    stages = until_stage(ordered(recipe), until)
    names = {id(stage): name for name, stage in stages.items()}
    factor, why = (
        (2, ", doubled for its bf16 instructions") if fast_bf16() else (1, "")
    )  # bf16 is what stages choose then
    speed = factor * matmul_speed("numpy", seconds=0.2)
    plans = {name: stage.plan() for name, stage in stages.items()}
    minutes = {name: plan.flops / (EFFICIENCY * speed * 1e9) / 60 for name, plan in plans.items()}
    table = Table(title=Text(f"{recipe.name}: {recipe.summary}"), title_justify="left")
    table.add_column("stage")
    table.add_column("kind")
    table.add_column("inputs")
    for column in ("rows", "tokens", "minutes", "GiB"):
        table.add_column(column, justify="right")
    for name, stage in stages.items():
        inputs = ", ".join(names[id(other)] for other in stage_inputs(stage).values())
        plan = plans[name]
        cost = (
            f"{plan.rows:,}",
            f"{plan.tokens:,}",
            f"{minutes[name]:.1f}",
            f"{plan.memory / doctor.GIB:.1f}",
        )
        table.add_row(name, type(stage).__name__, inputs or "-", *cost)
    table.add_section()
    tokens, peak = (
        sum(plan.tokens for plan in plans.values()),
        max((plan.memory for plan in plans.values()), default=0),
    )
    table.add_row("all", "", "", "", f"{tokens:,}", f"{sum(minutes.values()):.1f}", f"{peak / doctor.GIB:.1f}")
    console.print(table)
    for name, plan in plans.items():
        if plan.note:
            say(console, f"{name}: {plan.note}")
    say(
        console,
        f"minutes at {EFFICIENCY:.0%} of {speed:.0f} GFLOP/s, a matrix product measured on this CPU in fp32{why}",
    )
    if tiny:
        say(console, "the forecast is for the recipe as written; --tiny computes less")
    available = doctor.memory()["available"]
    if available is not None and peak / doctor.GIB > available:
        say(
            console,
            f"warning: needs {peak / doctor.GIB:.1f} GiB, {available:.1f} GiB of memory are available here",
        )
