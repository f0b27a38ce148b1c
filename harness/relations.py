"""What must hold beside the values of one call, as data: state across calls, buffers, and relations between inputs.

Every relation's answer is known to the oracle, so each is judged like a case of its own. A check is skipped where it says
nothing (`needs`) or where the backend declares why it does not promise it (`Backend.exempt`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from harness import variants
from harness.backends.base import Launch
from harness.hashing import Stream
from harness.inputs import Inputs
from harness.memory import HUGE, NAN, RED_ZONE, held
from harness.subject import Subject, SubjectError, malformed, same
from harness.verdict import Finding, Status
from reference.formats import get

STEP: dict[str, Callable[[Inputs], Tensor | None]] = {
    "x": lambda i: i.x,
    "logits": lambda i: i.logits,
    "bias": lambda i: i.bias,
    "ids": lambda i: i.topk_ids,
    "topk_weights": lambda i: i.topk_weights,
}
STRIDE_PAD = 64  # elements between two rows of a strided tensor: 128 bytes of bf16, what TMA asks of a stride
REFUSALS = ("contiguous", "stride", "align")  # what a clear refusal of a strided input speaks of
TINY = 2.0**-20  # a token that a scale kept in fp16 or a per-tensor scale rounds away, and one of its own keeps
OP_CHECKS = ("next_step", "out_buffer", "out_strided", "strided_inputs", "graph", "split_batch", "token_permutation")  # not moe
WIDEST = 1 << 22  # elements of x times experts up to which a relation re-runs the oracle


@dataclass(frozen=True)
class Check:
    """One question. status: what its finding means; needs(subject): why it says nothing here, or None."""

    name: str
    status: Status
    run: Callable[[Subject], Finding | None]
    needs: Callable[[Subject], str | None] = lambda subject: None


def chosen(subject: Subject, limit: int | None) -> list[Check]:
    """The checks for this case: all that apply, or `limit` of them picked by the case id, so that a plan covers them all."""
    asked = [c for c in CHECKS if subject.case.op == "moe" or c.name in OP_CHECKS]
    applying = [c for c in asked if c.name not in subject.backend.exempt and c.needs(subject) is None]
    if limit is None:
        return applying
    keys = Stream(subject.case.seed, f"checks.{subject.case.id}").fields(1, max(1, len(applying)), 32)[0].tolist()
    return [check for _, check in sorted(zip(keys, applying, strict=False), key=lambda pair: pair[0])][:limit]


def step(launch: Launch, inputs: Inputs) -> None:
    """Copy another step's data into the launch's buffers."""
    for name, source in STEP.items():
        value = source(inputs)
        if name in launch.buffers and value is not None:
            launch.buffers[name].copy_(value)


def _small(subject: Subject) -> str | None:
    shape = subject.case.shape
    if shape.tokens == 0:
        return "no tokens"
    work = (shape.tokens * shape.top_k + shape.experts) * shape.hidden
    return f"{work} elements of x and weights rows: the relation would run the oracle again" if work > WIDEST else None


def _stepped(subject: Subject) -> str | None:
    shown = subject.launch.buffers
    routed = "logits" in shown or "ids" in shown
    named = ("x" in shown and routed) if subject.case.op == "moe" else ("x" in shown or routed)
    return _small(subject) or (None if named else "its step buffers are not named")


def _next_step(subject: Subject) -> Finding | None:
    """The same launch on the next step's data, then on the first step's again; the first result must survive both."""
    other = subject.other
    step(subject.launch, other)
    output = subject.run(subject.launch.call)
    step(subject.launch, subject.inputs)
    if finding := subject.judge("next_step", "the next call, on other tokens and routing,", other, output):
        return _plain(subject, other) or finding
    return _aliased(subject) or _again(subject, "next_step", "after a call on other tokens")


def _other_weights(subject: Subject) -> Finding | None:
    """Another layer of the same shapes, prepared and run in between: caches must not confuse the two."""
    other = subject.other_layer
    output = subject.run(subject.prepare(other).call)
    if finding := subject.judge("other_weights", f"case {other.case.id}, run after this one,", other, output):
        return finding
    return _again(subject, "other_weights", "after another layer of the same shapes ran")


def _weights_in_place(subject: Subject) -> Finding | None:
    """Another layer's weights copied into this launch's buffers, as a reload does: the call must see them."""
    other = subject.other_layer
    source, target = subject.prepare(other).buffers, subject.launch.buffers
    if source.keys() != target.keys() or any(source[n].shape != t.shape for n, t in target.items()):
        return None
    kept = {name: tensor.clone() for name, tensor in target.items()}
    for name, tensor in target.items():
        tensor.copy_(source[name])
    output = subject.run(subject.launch.call)
    for name, tensor in target.items():
        tensor.copy_(kept[name])
    return subject.judge("weights_in_place", "the call after other weights were copied into its buffers", other, output)


def _again(subject: Subject, check: str, when: str) -> Finding | None:
    output = subject.run(subject.launch.call)
    if subject.backend.deterministic and not same(subject.result, output):
        return Finding(check, f"the first call repeated {when} gives other bits")
    return None if subject.backend.deterministic else subject.judge(check, f"the first call {when}", subject.inputs, output)


def _aliased(subject: Subject) -> Finding | None:
    if same(subject.result, subject.output):
        return None
    return Finding("aliasing", "a later call overwrote the tensor that an earlier call had returned")


def _has_out(subject: Subject) -> str | None:
    return None if subject.launch.out is not None and subject.case.shape.tokens else "the entry point has no out argument"


def _out_buffer(subject: Subject, strided: bool) -> Finding | None:
    """The caller's poisoned buffer must hold the result afterwards, and nothing around it may change."""
    assert subject.launch.out is not None
    name = "out_strided" if strided else "out_buffer"
    arena, buffer = _caller_buffer(subject.result, subject.output.device, strided)
    returned = subject.run(partial(subject.launch.out, buffer))
    if returned is not None and not (isinstance(returned, Tensor) and returned.data_ptr() == buffer.data_ptr()):
        return Finding(name, "the call returned another tensor than the out buffer it was given")
    unwritten = int(held(buffer.cpu(), HUGE).sum())
    if unwritten:
        return Finding(name, f"{unwritten} of {buffer.numel()} elements of the caller's out buffer were never written")
    if not same(subject.result, buffer) and subject.backend.deterministic:
        return Finding(name, "the caller's out buffer holds other values than the returned tensor of the call without out")
    outside = int((arena != HUGE)[~_inside(arena, buffer)].sum())
    return Finding("out_overrun", f"{outside} bytes around the caller's out buffer were written") if outside else None


def _caller_buffer(like: Tensor, device: torch.device, strided: bool) -> tuple[Tensor, Tensor]:
    """(arena of bytes, [tokens, hidden] view of it between red zones), every byte HUGE."""
    tokens, hidden = like.shape
    stride = hidden + (STRIDE_PAD if strided else 0)
    arena = torch.full((2 * RED_ZONE + tokens * stride * like.element_size(),), HUGE, dtype=torch.uint8, device=device)
    return arena, arena[RED_ZONE:-RED_ZONE].view(like.dtype).view(tokens, stride)[:, :hidden]


def _inside(arena: Tensor, buffer: Tensor) -> Tensor:
    """Mask of the arena's bytes that belong to the buffer."""
    mask = torch.zeros_like(arena)
    body = mask[RED_ZONE:-RED_ZONE].view(buffer.shape[0], -1)
    body[:, : buffer.shape[1] * buffer.element_size()] = 1
    return mask.bool()


def _strided_inputs(subject: Subject) -> Finding | None:
    """x and the logits as slices of wider tensors, at an offset, NaN between rows; or a refusal that says so."""
    inputs = subject.inputs
    wide = variants.replaced(inputs, x=_slice(inputs.x), logits=_slice(inputs.logits))
    try:
        output = subject.run(subject.prepare(wide, copy=False).call)
    except SubjectError as raised:
        if not _refuses(raised.error):
            raise
        return None
    return subject.judge("strided_inputs", "the call on strided x and logits", inputs, output, subject.expected)


def _refuses(error: BaseException) -> bool:
    """A host-side refusal that names the reason. A misaligned address on the device is an error, not a refusal."""
    text = str(error).lower()
    host = isinstance(error, ValueError | TypeError | RuntimeError | AssertionError) and "cuda error" not in text
    return host and "address" not in text and any(word in text for word in REFUSALS)


def _slice(x: Tensor) -> Tensor:
    """The values of x [rows, columns] in a wider, offset tensor whose other bytes are NaN."""
    rows, columns = x.shape
    wide = torch.empty(rows + 1, columns + STRIDE_PAD, dtype=x.dtype, device=x.device)
    wide.view(torch.uint8).fill_(NAN)
    view = wide[1:, :columns]
    view.copy_(x)
    return view


def _capturable(subject: Subject) -> str | None:
    if reason := _stepped(subject):
        return reason
    return None if subject.launch.capture or subject.device.kind == "cuda" else "no graph capture on this device"


def _graph(subject: Subject) -> Finding | None:
    """Capture once, replay on the same data, then on another step's tokens and routing, then on the first again."""
    replay = subject.run(subject.launch.capture or partial(_cuda_graph, subject.launch))
    assert callable(replay)
    other = subject.other
    for what, inputs in (("same data", subject.inputs), ("other tokens and routing", other), ("first data", subject.inputs)):
        step(subject.launch, inputs)
        output = subject.run(replay)
        finding = subject.judge("graph", f"the replay of a captured call on the {what}", inputs, output)
        if finding:
            step(subject.launch, subject.inputs)
            return _plain(subject, inputs) or finding
    return None


def _plain(subject: Subject, inputs: Inputs) -> Finding | None:
    """A freshly prepared call on the same data: if that is wrong too, no state is to blame."""
    output = subject.run(subject.prepare(inputs).call)
    return subject.judge("other_tokens", "a freshly prepared call on other tokens", inputs, output)


def _cuda_graph(launch: Launch) -> Callable[[], Tensor]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launch.call()  # lazy initialisation must not happen inside the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = launch.call()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def _tactics(subject: Subject) -> Finding | None:
    """Every tactic the library exposes gives a right answer."""
    for name, call in subject.launch.tactics.items():
        if finding := subject.judge("tactic", f"tactic {name}", subject.inputs, subject.run(call)):
            return finding
    return None


def _relation(name: str, what: str, make: Callable[[Inputs], Inputs], subject: Subject) -> Finding | None:
    inputs = make(subject.inputs)
    return subject.judge(name, what, inputs, subject.run(subject.prepare(inputs).call))


def _split(subject: Subject) -> Finding | None:
    """The batch in two uneven halves."""
    tokens = subject.case.shape.tokens
    for rows in (torch.arange(tokens // 3), torch.arange(tokens // 3, tokens)):
        inputs = variants.take(subject.inputs, rows.to(subject.inputs.x.device))
        if not subject.backend.supports(inputs.case, subject.device).ok:  # a kernel for few tokens that it does not answer for
            continue
        output = subject.run(subject.prepare(inputs).call)
        what = f"the call on tokens {int(rows[0])}..{int(rows[-1])} alone"
        if finding := subject.judge("split_batch", what, inputs, output, subject.expect_rows(inputs, rows)):
            return finding
    return None


def _garbage(subject: Subject) -> Finding | None:
    """NaN in the padding rows of a batch stays there."""
    inputs = variants.garbage_rows(subject.inputs)
    output = subject.run(subject.prepare(inputs).call)
    what = "a row beside padding rows of NaN"
    if finding := malformed(subject.case, output, subject.device):
        return Finding("garbage_rows", f"{what}: {finding.text}")
    assert isinstance(output, Tensor)
    rows = torch.arange(0, subject.case.shape.tokens, 2, device=subject.inputs.x.device)
    alone = variants.take(subject.inputs, rows)
    return subject.judge("garbage_rows", what, alone, output[rows.to(output.device)], subject.expect_rows(alone, rows))


def _permuted(subject: Subject) -> Finding | None:
    """The tokens in another order."""
    order = variants.another_order(subject.case.shape.tokens)
    inputs = variants.take(subject.inputs, order.to(subject.inputs.x.device))
    output = subject.run(subject.prepare(inputs).call)
    what = "the call on the tokens in another order"
    return subject.judge("token_permutation", what, inputs, output, subject.expect_rows(inputs, order))


def _relabelled(subject: Subject) -> Finding | None:
    """The experts under other numbers: the same layer."""
    inputs = variants.relabelled(subject.inputs)
    output = subject.run(subject.prepare(inputs).call)
    what = "the call with the experts under other numbers"
    return subject.judge("expert_relabelling", what, inputs, output, subject.expected)


def _shards(subject: Subject) -> Finding | None:
    """Every expert-parallel rank gives its experts' part, so that the two that hold all of them sum to the whole."""
    for inputs in variants.shards(subject.inputs):
        what = f"the rank that holds experts {inputs.local.start}..{inputs.local.stop - 1}"
        if finding := subject.judge("expert_parallel", what, inputs, subject.run(subject.prepare(inputs).call)):
            return finding
    return None


def _shows_weights(subject: Subject) -> str | None:
    return _small(subject) or (None if subject.launch.buffers.keys() - STEP.keys() else "its weight buffers are not shown")


def _rows_scale(subject: Subject) -> str | None:
    scaling = get(subject.case.recipe.acts).scaling
    if scaling is not None and scaling.static:
        return "x is quantised with a static scale"
    if subject.case.recipe.out == "fp16":
        return "tiny values are fp16's subnormals, whose few bits round in no random way"
    if subject.case.exact and not subject.backend.supports(subject.case.vary(fill="real"), subject.device).ok:
        return "the backend is asked exactly only, and tiny values do not saturate the gate"
    return _small(subject)


def _several(subject: Subject) -> str | None:
    return _small(subject) or (None if subject.case.shape.tokens >= 3 else "fewer than three tokens")


def _handed(subject: Subject) -> str | None:
    return _small(subject) or ("it routes by itself" if subject.backend.routings else None)


def _two_slots(subject: Subject) -> str | None:
    if subject.case.weighting == "oninput":
        return "two weights on the input are not their sum"
    return _handed(subject) or (None if subject.case.shape.top_k > 1 else "top_k is 1")


def _relabels(subject: Subject) -> str | None:
    return _small(subject) or (None if subject.case.shape.experts > 1 else "one expert")


def _parallel(subject: Subject) -> str | None:
    if not subject.backend.expert_parallel:
        return "the entry point has no expert-parallel range"
    return _relabels(subject)


def _listed(name: str, what: str, make: Callable[[Inputs], Inputs], needs: Callable[[Subject], str | None]) -> Check:
    return Check(name, Status.WRONG, partial(_relation, name, what, make), needs)


CHECKS: tuple[Check, ...] = (
    Check("next_step", Status.UNSTABLE, _next_step, _stepped),
    Check("other_weights", Status.UNSTABLE, _other_weights, _small),
    Check("weights_in_place", Status.UNSTABLE, _weights_in_place, _shows_weights),
    Check("out_buffer", Status.WRONG, partial(_out_buffer, strided=False), _has_out),
    Check("out_strided", Status.WRONG, partial(_out_buffer, strided=True), _has_out),
    Check("strided_inputs", Status.WRONG, _strided_inputs, _small),
    Check("graph", Status.UNSTABLE, _graph, _capturable),
    Check("tactic", Status.WRONG, _tactics, lambda s: None if s.launch.tactics else "one tactic"),
    Check("split_batch", Status.WRONG, _split, _several),
    Check("garbage_rows", Status.WRONG, _garbage, _several),
    Check("expert_parallel", Status.WRONG, _shards, _parallel),
    Check("token_permutation", Status.WRONG, _permuted, _several),
    Check("expert_relabelling", Status.WRONG, _relabelled, _relabels),
    _listed("zero_weight", "the call with a routing weight of zero in every second row", variants.zero_weight, _handed),
    _listed("halved_weights", "the call with routing weights halved in every second row", variants.halved_weights, _handed),
    _listed("zero_rows", "the call with every second token 0", partial(variants.scaled_rows, factor=0.0), _small),
    _listed("tiny_rows", "the call with every second token tiny", partial(variants.scaled_rows, factor=TINY), _rows_scale),
    _listed("duplicate_expert", "the call with an expert named twice in a row", variants.duplicate_expert, _two_slots),
)
