"""The comparison in two sentences and one table."""

from __future__ import annotations

from collections.abc import Sequence

from resq.measure.perplexity import Interval
from resq.report.comparison import Case, Comparison, clean, width_name
from resq.report.figure import Table, signed

# Fewer true bits than this on average: weights, activations and cache are all rounded.
ALL_ROUNDED = 6.0


def everything_rounded(cases: Sequence[Case]) -> list[Case]:
    """Those that round weights, inputs, keys and values all to less than `ALL_ROUNDED` true bits."""
    return [case for case in cases if max(case.true_bits) < ALL_ROUNDED]


def interval(delta: Interval) -> str:
    """−0.0040 [−0.0051, −0.0029]."""
    return f"{signed(delta.mean)} [{signed(delta.low)}, {signed(delta.high)}]"


def verdict(comparison: Comparison) -> str:
    """Two sentences: the best recipe where everything is rounded, its distance to 16 bit, and to the next best."""
    cases = comparison.focus
    alike = everything_rounded(cases)
    among = "that round weights, activations and cache alike" if len(alike) > 1 else "compared"
    best, *others = sorted(alike if len(alike) > 1 else cases, key=lambda case: case.perplexity)
    # An interval that contains 0 is no difference.
    if best.delta.low <= 0 <= best.delta.high:
        distance = "not distinguishable from 16 bit"
    else:
        distance = f"{best.perplexity / comparison.base.perplexity:.4f} times the perplexity of 16 bit"
        if best.delta.high < 0:
            distance += ", which is no gain: rounding leans towards its calibration text"
    band = f"With a low band of {comparison.width} bit" if comparison.width else "With every recipe at its own width"
    words = f"{interval(best.delta)} nats per token, {distance}"
    windows = f"(95 % intervals, bootstrap over {len(comparison.base.tokens['nll'])} windows)"
    if not others:
        return f"{band}, {best.recipe} adds {words}. No other recipe was compared {windows}."
    first = f"{band}, {best.recipe} loses least of the {len(others) + 1} recipes {among}: {words}."
    second = others[0]
    between = second.against(best)
    if between.low > 0:
        return f"{first} It beats the next, {second.recipe}, by {interval(between)} nats {windows}."
    return f"{first} The text does not tell it from the next, {second.recipe}: {interval(between)} nats {windows}."


COLUMNS = (
    "recipe",
    "low band",
    "perplexity",
    "× 16 bit",
    "Δ nats per token [95 %]",
    "KL to 16 bit",
    "same top token",
    "true bits W / A / K / V",
    "MB",
    "quantize, s",
    "peak MB",
    "tokens/s",
)


def table(comparison: Comparison) -> Table:
    """Every row of the comparison, 16 bit first."""
    rows = [_row(case, comparison.base) for case in (comparison.base, *comparison.cases)]
    return Table("Every case, the 16-bit model first", COLUMNS, tuple(rows))


def _row(case: Case, base: Case) -> tuple[str, ...]:
    row = case.row

    def shown(value: float | None, format: str, unit: float = 1) -> str:
        return "" if value is None else f"{value / unit:{format}}"

    seed = f", seed {row.seed}" if row.seed else ""
    return (
        f"{case.recipe}{seed}",
        "" if row.delta is None else width_name(row.bits),
        shown(row.perplexity, ".3f"),
        shown(case.perplexity / base.perplexity, ".4f"),
        "" if row.delta is None else interval(row.delta),
        shown(None if row.kl is None else row.kl.mean, ".4f"),
        shown(None if row.agreement is None else row.agreement.mean, ".1%"),
        "16 / 16 / 16 / 16" if row.ledger is None else " / ".join(f"{bits:.2f}" for bits in case.true_bits),
        shown(row.bytes, ",.1f", 1e6),
        shown(row.quantize_seconds, ",.0f"),
        shown(row.peak_bytes, ",.0f", 1e6),
        shown(None if row.speed is None else row.speed.tokens_per_second, ",.0f"),
    )


def facts(comparison: Comparison) -> dict[str, str]:
    """How it was made, in words."""
    source, windows, made = (comparison.facts[key] for key in ("source", "windows", "provenance"))
    plan = comparison.plan
    found = {
        "source": f"{source['name']}: {source.get('model_type')}, {source.get('dtype')}, "
        f"{source.get('parameters', 0):,} parameters",
        "text": f"{windows.get('text')}: {windows['count']} windows of {windows.get('length')} tokens",
        "calibration": f"{', '.join(plan.calibration) or 'the text the model was trained on'}: {plan.windows} windows",
        "seeds": ", ".join(map(str, plan.seeds)),
        "state": comparison.facts["state"],
        **{key: made[key] for key in ("command", "commit", "resq", "torch", "machine", "time") if key in made},
    }
    return {key: clean(str(value)) for key, value in found.items()}
