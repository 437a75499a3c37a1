"""What quantizing holds in memory, phase by phase, from sizes alone: every term has a name. docs/large-models.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from resq.models.architecture import READERS, Point, Role, Shape, Site
from resq.models.text import OVERSAMPLED, PIECE, WHOLE
from resq.numerics.moments import Leaves, half
from resq.numerics.packing import packed_bytes
from resq.ptq.activations import Place
from resq.ptq.ends import BLOCK
from resq.ptq.recipe import Recipe, Statistic
from resq.ptq.rounding import ROWS
from resq.ptq.rounding.gptq import PANEL, Gptq

# Bytes while a document is tokenized, per byte of it (8 MB, the embedded model's tokenizer; pieces of 40 MB for
# 16, 524 and 2097 thousand tokens took 0.87 to 0.89 of both); per token that is kept until the last.
TOKENIZED, PER_TOKEN = 172, 40
# What libraries keep for themselves once they compute: 15 to 48 MB in six runs of five recipes, one thread.
LIBRARIES = 40 << 20
# [n, n] float64 that fitting one basis of n coordinates takes: moment, argument, vectors, LAPACK's two, their signs.
FITTED = 7
# Bytes of a weight while a block of rows goes from integers to float64.
DEQUANTIZED = 25
# float64 [ROWS, in] while a block of rows is rounded, and as many more where it is corrected.
BLOCKS, CORRECTED = 6, 4
# float64 [PANEL, in] while a factor is made.
PANELS = 3
# float32 [tokens, F] of the MLP at once, where its activations are rounded too, and [tokens, H·h] of attention.
MLP, MLP_ROUNDED, ATTENTION = 5, 8, 6


@dataclass(frozen=True)
class Work:
    """What decides memory and time beside the machine. value_bytes: of a stored weight. text: bytes of the largest
    calibration text that is no .jsonl, None where it is not known; documents: of the largest .jsonl. cuda: computed on
    a card; collected: the bases' statistics come from a file."""

    shape: Shape
    recipe: Recipe
    windows: int
    rounding_windows: int
    length: int
    place: Place = Place.DEVICE
    cuda: bool = False
    keep_tied: bool = False
    value_bytes: int = 2
    text: int | None = None
    documents: int = 0
    collected: bool = False

    @property
    def passes(self) -> bool:
        """Whether pass 1 is run."""
        return bool(self.recipe.needs) and not self.collected

    @property
    def looks(self) -> bool:
        """Whether anything looks at calibration text; that of a statistics file is compared where it is given."""
        compared = self.collected and (self.text is not None or self.documents > 0)
        return bool(self.passes or compared or self.recipe.tuning or self.recipe.needs_windows)

    @property
    def rounded(self) -> int:
        """Windows that are run while layers are rounded."""
        return self.rounding_windows if self.recipe.needs_windows else 0

    @property
    def streams(self) -> int:
        """Of hidden states: what the rounded model sees, and the unrounded one where weights are corrected."""
        return 2 if self.recipe.corrects else 1

    def weights(self, *roles: Role) -> int:
        """Weights of these linears of a layer, of all without any."""
        sizes = self.shape.sizes()
        return sum(prod(sizes[role]) for role in roles or Role)

    def packed(self, role: Role, layer: int = 0) -> int:
        """Bytes of a stored linear."""
        out, inner = self.shape.sizes()[role]
        bands = self.recipe.precision.weight_bands(layer, role, self.shape)
        if bands is None:
            return 2 * out * inner
        return out * (sum(packed_bytes(band.size, band.bits) for band in bands) + 4 * len(bands))

    def states(self, windows: int) -> int:
        """Bytes of the hidden states of so many windows."""
        return 4 * windows * self.length * self.shape.hidden


@dataclass(frozen=True)
class Moment:
    """Bytes held at one moment of a phase, by name: where it is computed, and in the machine's memory in any case."""

    what: str
    computing: Mapping[str, int]
    host: Mapping[str, int]

    @property
    def card(self) -> int:
        """Bytes where it is computed."""
        return sum(self.computing.values())

    @property
    def machine(self) -> int:
        """Bytes of the machine's memory beside that."""
        return sum(self.host.values())


@dataclass(frozen=True)
class Holding:
    """A phase and its moments."""

    phase: str
    moments: tuple[Moment, ...]

    def terms(self, *, cuda: bool) -> dict[str, int]:
        """Of the moment that holds most of the machine's memory, largest first, with what it is named."""
        moment = self.worst(cuda=cuda)
        all_terms = {**moment.host, **({} if cuda else moment.computing)}
        return dict(sorted(((name, size) for name, size in all_terms.items() if size), key=lambda each: -each[1]))

    def worst(self, *, cuda: bool) -> Moment:
        """The moment that holds most of the machine's memory."""
        return max(self.moments, key=lambda moment: moment.machine + (0 if cuda else moment.card))

    def machine(self, *, cuda: bool) -> int:
        """Peak of the machine's memory, bytes."""
        moment = self.worst(cuda=cuda)
        return moment.machine + (0 if cuda else moment.card)

    def card(self, *, cuda: bool) -> int:
        """Peak of the card's memory, bytes."""
        return max(moment.card for moment in self.moments) if cuda else 0


def nodes(windows: int) -> int:
    """The most sums that a tree of so many windows holds while they come one after the other."""
    return max(number.bit_count() + 1 for number in range(Leaves(windows).count)) if windows else 0


def holdings(work: Work, process: int) -> list[Holding]:
    """Every phase's moments. process: bytes of a process that has done nothing yet."""
    found = []
    for phase, moments in (
        ("tokenizing", _text(work)),
        ("collecting moments", _first_pass(work) if work.passes else iter(())),
        ("fitting bases", _fitting(work)),
        ("embedding and head", _ends(work)),
        ("rounding", _second_pass(work)),
    ):
        base = {"process": process, "libraries": LIBRARIES}
        named = tuple(Moment(each.what, each.computing, {**base, **each.host}) for each in moments)
        if named:
            found.append(Holding(phase, named))
    return found


def _stated(work: Work, windows: int, name: str, bytes: int) -> tuple[dict[str, int], dict[str, int]]:
    """Hidden states as (computing, host) terms, where the job keeps them."""
    if work.place is Place.DISK or not windows:
        return {}, {}
    return ({name: bytes}, {}) if work.place is Place.DEVICE else ({}, {name: bytes})


def _text(work: Work) -> Iterator[Moment]:
    if not work.looks:
        return
    kept = PER_TOKEN * OVERSAMPLED * work.windows * work.length
    if work.text is not None and work.text <= WHOLE:
        yield Moment("tokens of the calibration text", {}, {"text and its tokens": TOKENIZED * work.text})
    elif work.text is not None:
        pieces = {"a piece of the text": TOKENIZED * PIECE, "tokens of pieces": kept}
        yield Moment("tokens of the calibration text", {}, pieces)
    if work.text is None or work.documents:
        yield Moment("tokens of documents", {}, {"documents": work.documents, "their tokens": kept})


def _first_pass(work: Work) -> Iterator[Moment]:
    shape, needs = work.shape, work.recipe.needs
    d, length, leaves = shape.hidden, work.length, Leaves(work.windows).count
    heads, largest = shape.heads * shape.head_dim, max(map(prod, shape.sizes().values()))
    states, host = _stated(work, work.windows, "hidden states", work.states(work.windows))
    square, small = 8 * d * d, _small_moments(work) * shape.layers
    sums = {"moments of the residual stream": leaves * square if Statistic.RESIDUAL in needs else 0}
    sums["moments of values and keys"] = small + leaves * _small_moments(work)
    layer = {"a layer in float32": 4 * work.weights()}
    yield Moment("reading a layer", {**states, **sums, **layer, "one linear in float64": 16 * largest}, host)
    # What the window before was is let go step by step.
    before = length * 4 * (4 * d + heads + shape.ffn)
    window = 4 * length * (4 * d + ATTENTION * heads) + before
    yield Moment("attention", {**states, **sums, **layer, "one window": window}, host)
    window = 4 * length * (5 * d + heads + (MLP + 1) * shape.ffn)
    yield Moment("the MLP", {**states, **sums, **layer, "one window": window}, host)
    window = 4 * length * (6 * d + 3 * heads + 2 * shape.ffn)
    if Statistic.RESIDUAL in needs:
        joined = sums | {"moments of the residual stream": (leaves + leaves.bit_length() - 1) * square}
        yield Moment("joining the sums", {**states, **joined, "one window": window}, host)


def _small_moments(work: Work) -> int:
    """Bytes of a layer's moments of values and keys."""
    h, needs = work.shape.head_dim, work.recipe.needs
    return 8 * h * h * ((Statistic.VALUE in needs) * work.shape.kv_heads + (Statistic.KEY in needs))


def _kept(work: Work) -> dict[str, int]:
    """What stays of a statistics file, whose sums themselves are mapped, from the bases to the end."""
    square = 8 * work.shape.hidden**2 if Statistic.RESIDUAL in work.recipe.needs else 0
    return {"moments of the statistics": square + _small_moments(work) * work.shape.layers} if work.collected else {}


def maps(work: Work) -> int:
    """Bytes of the maps that stay while layers are placed."""
    shape, sites = work.shape, {site for basis in work.recipe.basis for site in basis.sites}
    size = 8 * shape.hidden**2 if Site.RESIDUAL in sites else 0
    per_layer = 8 * shape.head_dim**2 * shape.kv_heads if Site.VALUE in sites else 0
    if Statistic.KEY in work.recipe.needs:
        per_layer += 8 * shape.head_dim**2
    return size + per_layer * shape.layers


def _fitting(work: Work) -> Iterator[Moment]:
    sites = {site for basis in work.recipe.basis for site in basis.sites}
    if Site.RESIDUAL in sites:
        square = 8 * work.shape.hidden**2
        # One of them is the moment, on a CPU the one that is kept.
        fitted = FITTED - (Statistic.RESIDUAL in work.recipe.needs and work.collected and not work.cuda)
        yield Moment("the residual's basis", {"eigenvectors and rotations": fitted * square}, _kept(work))


def _ends(work: Work) -> Iterator[Moment]:
    shape, head = work.shape, work.recipe.precision.head
    table, square = shape.vocab * shape.hidden, 8 * shape.hidden**2
    host = {"embedding": 2 * table, **_kept(work)}
    if not work.keep_tied:
        host["head"] = 2 * table if head is None else table
    wide = 32 if work.recipe.folds_norms else 18
    rows = {"a block of the vocabulary": wide * BLOCK * shape.hidden, "maps": maps(work)}
    yield Moment("placing the embedding", rows, host)
    if work.keep_tied and work.recipe.folds_norms:
        yield Moment("the head's map", {"the head's map": 4 * square, "maps": maps(work)}, _kept(work))


def _second_pass(work: Work) -> Iterator[Moment]:
    shape, recipe, count, streams = work.shape, work.recipe, work.rounded, work.streams
    d, length, heads = shape.hidden, work.length, shape.heads * shape.head_dim
    states, host = _stated(work, count, "hidden states", streams * work.states(count))
    host = {**host, **_kept(work)}
    attended = _stated(work, count, "attention's outputs", 4 * streams * count * length * heads)
    held = {**states, "maps": maps(work)}
    sizes, done = shape.sizes(), list[Role]()
    left = [role for roles in READERS.values() for role in roles]
    down = 8 * work.weights(Role.DOWN)
    wide = {"a layer in float64": 8 * work.weights()}
    yield Moment("placing a layer", {**held, **wide, "one linear more": 2 * down}, host)
    mlp = (MLP_ROUNDED if recipe.sees_rounded else MLP) * shape.ffn
    for point, roles in READERS.items():
        size = sizes[roles[0]][1]
        square, kinds = 8 * size * size, 2 if recipe.corrects else 1
        layer = {
            "linears left in float64": 8 * work.weights(*left) if left else 0,
            "linears done in float32": 4 * streams * sum(work.weights(role) for role in done),
            "packed linears": sum(work.packed(role) for role in done),
        }
        own, own_host = dict(held), dict(host)
        if point is Point.O_IN:
            own |= attended[0]
            own_host |= attended[1]
        # The input of the window before is there until the next is made.
        window = 4 * length * (mlp + size + 2 * d) if point is Point.DOWN_IN else 4 * length * (4 * size + 3 * d)
        if recipe.needs_moment:
            tree = {f"Hessians of {_input(point)}": nodes(count) * (8 * half(size) + (kinds - 1) * square)}
            yield Moment(f"moments of {_input(point)}", {**own, **layer, **tree, "one window": window}, own_host)
        for role in roles:
            out, kept = sizes[role][0], recipe.rounding_of(0, role)
            sums, factors = {f"Hessians of {_input(point)}": kinds * square * recipe.needs_moment}, 0
            if isinstance(kept, Gptq):
                # One lies in the Hessian's own lower half.
                factors = 1 if kept.corrects else 0
                making = {"factors": factors * square + PANELS * 8 * PANEL * size}
                yield Moment(f"factorizing for {role}", {**own, **layer, **sums, **making}, own_host)
            block = 8 * min(ROWS, out) * size * (BLOCKS + CORRECTED * recipe.corrects)
            after = {**own, **layer, **sums, "factors": factors * square}
            yield Moment(f"rounding {role}", {**after, "rows being rounded": block}, own_host)
            unpacked = {"one linear unpacked": (4 * out + DEQUANTIZED * min(ROWS, out)) * size}
            yield Moment(f"unpacking {role}", {**after, **unpacked}, own_host)
            left.remove(role)
            done.append(role)
            # The group's first weight stays until its last is rounded.
            waiting = [roles[0], *left] if role is not roles[-1] else left
            layer = {
                "linears left in float64": 8 * work.weights(*waiting) if waiting else 0,
                "linears done in float32": 4 * streams * sum(work.weights(each) for each in done),
                "packed linears": sum(work.packed(each) for each in done),
            }
        if count and point in (Point.ATTN_IN, Point.DOWN_IN):
            widths = ATTENTION * heads if point is Point.ATTN_IN else mlp
            run = {"one window": 4 * length * (4 * d + widths)}
            more = attended if point is Point.ATTN_IN else ({}, {})
            yield Moment(f"past {_input(point)}", {**own, **more[0], **layer, **run}, {**own_host, **more[1]})


def _input(point: Point) -> str:
    return {"attn_in": "q, k, v", "o_in": "o", "mlp_in": "gate, up", "down_in": "down"}[point]
