"""SEED, CompRess, DisCo, SimReg, ISD and CoSS against their definitions, one similarity at a time in floats."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from published import lively
from torch import nn

from bingo import seeds
from bingo.methods.contract import Batch, Context, Method, Progress, build_method
from bingo.methods.parts.losses import kl_divergence, soft_cross_entropy
from bingo.methods.parts.momentum import Queue
from bingo.nets.batchnorm.groups import grouped_batchnorm
from bingo.params import method_section
from bingo.runtime.errors import UserError
from bingo.teachers.teacher import Teacher

CPU = torch.device("cpu")
WIDTH, KEY, FEATURE, ROWS, VIEWS, BATCH, PX = 5, 4, 7, 30, 3, 6, 6
SECTIONS = {
    "seed": {
        "student_temperature": 0.2, "teacher_temperature": 0.3, "negatives": "bank", "negative_rows": 12, "head_hidden": 8,
        "small_crops": 0, "small_crop_px": 4, "small_crop_scale": [0.05, 0.14],
    },
    "compress": {"queues": 2, "target": "features", "temperature": 0.2, "queue_rows": 10, "key_momentum": 0.9},
    "disco": {
        "temperature": 0.2, "queue_rows": 10, "key_momentum": 0.9, "regression_weight": 3.0, "teacher_batchnorm": "eval", "head_hidden": 8,
    },
    "simreg": {"target": "features", "head_layers": 4, "head_hidden": 6},
    "isd": {
        "student_temperature": 0.3, "key_temperature": 0.15, "queue_rows": 10, "key_momentum": 0.9, "weak_keys": False,
        "projection_width": None, "head_hidden": 6,
    },
    "coss": {"target": "features", "companions": 0, "teacher_temperature": 0.07, "student_temperature": 0.1, "head_hidden": 8},
}  # fmt: skip
VARIANTS = [
    ("seed", {}), ("seed", {"negatives": "queue", "negative_rows": 12}), ("compress", {}), ("compress", {"queues": 1}),
    ("compress", {"target": "keys"}), ("disco", {}), ("simreg", {}), ("simreg", {"target": "keys", "head_layers": 2}), ("isd", {}),
    ("isd", {"projection_width": 3}), ("coss", {}), ("coss", {"target": "keys"}),
]  # fmt: skip


class Student(nn.Module):
    """Pooled pixels and one layer, without BatchNorm, so that each output depends only on its own image."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, WIDTH)

    def forward(self, images):
        return torch.relu(self.layer(images.mean(dim=(2, 3))) + 0.5)


class FrozenTeacher(nn.Module):
    """Features that are not normalised, and keys that are."""

    metadata = {"feature_width": FEATURE, "key_width": KEY}
    backbone = head = None  # used by a compiled step

    def __init__(self):
        super().__init__()
        self.to_features, self.to_keys = nn.Linear(3, FEATURE), nn.Linear(3, KEY)

    def batch_statistics(self, on):
        assert not on

    @torch.no_grad()
    def features(self, images):
        return 3 * self.to_features(images.mean(dim=(2, 3)))

    @torch.no_grad()
    def keys(self, images):
        return F.normalize(self.to_keys(images.mean(dim=(2, 3))), dim=1)


def make_context(source: str = "stored") -> Context:
    """Stored: there is no teacher. Live: there are no stored outputs, or only keys as in the pipeline."""
    torch.manual_seed(0)
    student, teacher = Student(), FrozenTeacher()
    keys = F.normalize(torch.randn(ROWS, VIEWS, KEY), dim=2).half()
    features = (5 * torch.randn(ROWS, FEATURE)).half()
    if source == "stored":
        return Context(student, WIDTH, 0, source, "fp32", CPU, None, keys, features)
    return Context(student, WIDTH, 0, source, "fp32", CPU, teacher, keys if source == "live" else None)


def make_batch(context: Context, rows=(3, 4, 9, 11, 20, 29), seed: int = 1) -> Batch:
    torch.manual_seed(seed)
    views = [torch.randn(len(rows), 3, PX, PX) + torch.randn(len(rows), 3, 1, 1) for _ in range(2)]
    batch = Batch(torch.tensor(rows), views)
    if context.keys == "stored":
        assert context.keys_TVP is not None
        assert context.features_TD is not None
        first = torch.arange(len(rows)) % VIEWS
        batch.anchor_keys = [context.keys_TVP[list(rows), (first + step) % VIEWS].float() for step in (0, 1)]
        batch.anchor_features_BD = context.features_TD[list(rows)].float()
    return batch


def build(name: str, context: Context, **changes) -> Method:
    return build_method(name, method_section(name).model_validate(SECTIONS[name] | changes), context)


# The definitions. Vectors are lists of Python floats.


def dot(a, b) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def unit(a) -> list[float]:
    return [x / math.sqrt(dot(a, a)) for x in a]


def cosine(a, b) -> float:
    return dot(unit(a), unit(b))


def softmax(values) -> list[float]:
    highest = max(values)
    exps = [math.exp(value - highest) for value in values]
    return [x / sum(exps) for x in exps]


def kl(p, q) -> float:
    return sum(x * math.log(x / y) for x, y in zip(p, q, strict=True) if x > 0)


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def rows_of(x) -> list[list[float]]:
    return x.detach().double().tolist()


def teacher_of(context: Context, batch: Batch, target: str, view: int = 0) -> list[list[float]]:
    """Stored: from the batch; live: the teacher's outputs for the view that the student sees."""
    if context.keys == "stored":
        return rows_of(batch.anchor_keys[view] if target == "keys" else batch.anchor_features_BD)
    return rows_of(getattr(context.teacher, target)(batch.anchor_views[view]))


def layers(rows, weights) -> list[list[float]]:
    """A perceptron, layer by layer in float64: ("linear", W, b or None), ("batchnorm", gain, shift) over the batch, ("relu",)."""
    x = np.array(rows)
    for kind, *parts in weights:
        arrays = [None if part is None else part.detach().double().numpy() for part in parts]
        if kind == "linear":
            x = x @ arrays[0].T + (0 if arrays[1] is None else arrays[1])
        elif kind == "batchnorm":
            x = (x - x.mean(0)) / np.sqrt(((x - x.mean(0)) ** 2).mean(0) + 1e-5) * arrays[0] + arrays[1]
        else:
            x = np.maximum(x, 0)
    return x.tolist()


def two_layers(network: nn.Module) -> list:
    """Linear without bias, BatchNorm, ReLU, Linear: ISD's head, and each half of SimReg's head of 4 layers."""
    first, gain, shift, second, bias = network.parameters()
    return [("linear", first, None), ("batchnorm", gain, shift), ("relu",), ("linear", second, bias)]


def mlp(network: nn.Module) -> list:
    """Linear, ReLU, Linear: the head of MoCo-v2."""
    first, first_bias, second, second_bias = network.parameters()
    return [("linear", first, first_bias), ("relu",), ("linear", second, second_bias)]


def pooled(method: Method, batch: Batch, view: int = 0) -> list[list[float]]:
    return rows_of(method.student(batch.anchor_views[view]))


def filled(queue) -> list[list[float]]:
    """The queue's vectors: keys of rows, or only random ones if there are no keys yet."""
    keys = rows_of(queue.keys_QP)
    return [key for key, row in zip(keys, queue.rows_Q.tolist(), strict=True) if row >= 0] or keys


def loop_seed(method, context, batch, step) -> float:
    params, targets = method.params, teacher_of(context, batch, "keys")
    students = [unit(x) for x in layers(pooled(method, batch), mlp(method.head))]
    losses = []
    for row, s, t in zip(batch.anchor_rows_B.tolist(), students, targets, strict=True):
        if params.negatives == "queue":
            others = filled(method.negatives.queue)
        else:
            drawn = seeds.distinct(0, "negatives", step, ROWS, params.negative_rows).tolist()
            view = {r: int(seeds.uniforms(0, "negative view", step, [r])[0, 0] * VIEWS) for r in drawn}
            others = [context.keys_TVP[r, view[r]].tolist() for r in drawn if r != row]
        p = softmax([x / params.teacher_temperature for x in [dot(t, t), *(dot(t, o) for o in others)]])
        q = softmax([x / params.student_temperature for x in [dot(s, t), *(dot(s, o) for o in others)]])
        losses.append(-sum(x * math.log(y) for x, y in zip(p, q, strict=True)))
    return mean(losses)


def loop_compress(method, context, batch, step) -> float:
    params, two = method.params, method.params.queues == 2
    outputs = pooled(method, batch)
    students = [unit(x) for x in (outputs if two else layers(outputs, [("linear", *method.head.parameters())]))]
    teachers = [unit(x) for x in teacher_of(context, batch, params.target)]
    bank_t = filled(method.teacher_queue)
    bank_s = filled(method.student_queue) if two else bank_t
    losses = []
    for s, t in zip(students, teachers, strict=True):
        p = softmax([dot(t, q) / params.temperature for q in bank_t])
        losses.append(kl(p, softmax([dot(s, q) / params.temperature for q in bank_s])))
    return mean(losses)


def loop_disco(method, context, batch, step) -> float:
    params = method.params
    q1, q2 = ([unit(x) for x in layers(pooled(method, batch, view), mlp(method.head))] for view in (0, 1))
    t1, t2 = (teacher_of(context, batch, "keys", view) for view in (0, 1))
    ema_student, ema_head = method.key_encoder.network
    k2 = [unit(x) for x in layers(rows_of(ema_student(batch.anchor_views[1])), mlp(ema_head))]
    negatives, losses = filled(method.queue), []
    for i in range(len(q1)):
        p = softmax([dot(q1[i], x) / params.temperature for x in [k2[i], *negatives]])
        distances = [sum((x - y) ** 2 for x, y in zip(q[i], t[i], strict=True)) for q, t in ((q1, t1), (q2, t2))]
        losses.append(-math.log(p[0]) + params.regression_weight * sum(distances))
    return mean(losses)


def loop_simreg(method, context, batch, step) -> float:
    outputs = pooled(method, batch)
    parameters = list(method.head.parameters())
    if len(parameters) == 4:  # mlp_arch.py with n_layers 2: only two linear layers with biases
        outputs = layers(outputs, [("linear", *parameters[:2]), ("linear", *parameters[2:])])
    else:
        for part in method.head:
            outputs = layers(outputs, two_layers(part))
    targets = teacher_of(context, batch, method.targets.target)
    return mean(2 - 2 * cosine(g, t) for g, t in zip(outputs, targets, strict=True))


def loop_isd(method, context, batch, step) -> float:
    params = method.params
    queries = pooled(method, batch)
    ema_student, ema_projector = method.key_encoder.network
    keys = rows_of(ema_student(batch.anchor_views[1]))
    if params.projection_width:
        queries, keys = layers(queries, two_layers(method.projector)), layers(keys, two_layers(ema_projector))
    queries = [unit(x) for x in layers(queries, two_layers(method.head[1]))]
    bank, losses = filled(method.queue), []
    for q, k in zip(queries, map(unit, keys), strict=True):
        p = softmax([dot(k, x) / params.key_temperature for x in bank])
        losses.append(kl(p, softmax([dot(q, x) / params.student_temperature for x in bank])))
    return mean(losses)


def loop_coss(method, context, batch, step) -> float:
    params = method.params
    s = layers(pooled(method, batch), mlp(method.head))
    t = teacher_of(context, batch, params.target)
    sample = mean(-cosine(a, b) for a, b in zip(s, t, strict=True))
    dimension = mean(-cosine(a, b) for a, b in zip(zip(*s, strict=True), zip(*t, strict=True), strict=True))
    return 142.85714285714286 * (sample + dimension)  # 1 / (0.07 x 0.1)


LOOPS = {
    "seed": loop_seed, "compress": loop_compress, "disco": loop_disco, "simreg": loop_simreg, "isd": loop_isd, "coss": loop_coss,
}  # fmt: skip


@pytest.mark.parametrize("source", ["stored", "live"])
@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_a_method_follows_its_definition_before_and_after_a_step(name, changes, source):
    """The same value twice before the step; after it, the new keys are compared with, and empty places are not."""
    context = make_context(source)
    method = build(name, context, **changes)
    with torch.no_grad():  # so that a moving average differs from the network it was copied from
        for parameter in [*method.student.parameters(), *method.head.parameters()]:
            parameter += 0.1 * torch.randn(parameter.shape)
    for step, batch in enumerate([make_batch(context), make_batch(context, (5, 9, 11, 12, 13, 14), 2)]):
        want = LOOPS[name](method, context, batch, step)
        for _ in range(2):
            loss = method(batch, Progress(0, step))["loss"]
            assert loss.dtype == torch.float32
            assert loss.item() == pytest.approx(want, rel=5e-5, abs=1e-6)
        loss.backward()
        method.after_step()


@pytest.mark.parametrize("projection_width", [None, 3])
def test_isd_needs_no_teacher(projection_width):
    context = make_context("momentum")
    method = build("isd", context, projection_width=projection_width)
    batch = make_batch(context)
    assert method(batch, Progress(0, 0))["loss"].item() == pytest.approx(loop_isd(method, context, batch, 0), rel=5e-5)


@pytest.mark.parametrize("source", ["stored", "live"])
def test_needs_are_what_the_definition_reads(source):
    stored = source == "stored"
    expected = {  # views of the anchor, stored ones among them, weak ones; stored keys or not, stored features or not; companions
        "seed": ({}, (1, stored, 0, stored, False, 0)),
        "compress": ({"target": "features"}, (1, 0, 0, False, stored, 0)),
        "disco": ({}, (2, 2 * stored, 0, stored, False, 0)),
        "simreg": ({"target": "keys"}, (1, stored, 0, stored, False, 0)),
        "isd": ({"weak_keys": True}, (2, 0, 1, False, False, 0)),
        "coss": ({"target": "features", "companions": 3}, (1, 0, 0, False, stored, 3)),
    }
    for name, (changes, want) in expected.items():
        needs = build(name, make_context(source), **changes).needs
        got = (needs.anchor_views, needs.same_views, needs.weak_views, needs.stored_keys, needs.stored_features, needs.companions)
        assert (got, needs.members) == (want, False), name


def test_feature_targets_are_read_from_the_store_and_key_targets_are_not():
    for name in ("compress", "simreg", "coss"):
        for target in ("keys", "features"):
            section = method_section(name).model_validate(SECTIONS[name] | {"target": target})
            assert section.reads_features == (target == "features")
    assert not any(method_section(name).model_validate(SECTIONS[name]).reads_features for name in ("seed", "disco", "isd"))


# Closed forms


class Copy(nn.Module):
    """A network that returns given outputs, whatever its input."""

    def __init__(self, output: torch.Tensor):
        super().__init__()
        self.output = nn.Parameter(output.clone())

    def forward(self, _):
        return self.output


def test_seed_with_a_cold_teacher_is_info_nce_against_the_bank():
    """At 1e-4 (as in the released code), the teacher's row is one-hot at the own key."""
    context = make_context()
    method = build("seed", context, negatives="queue", negative_rows=12, teacher_temperature=1e-4)
    outside = sorted(set(range(ROWS)) - set(method.negatives.queue.rows_Q.tolist()))[:BATCH]
    batch = make_batch(context, outside)
    students = [unit(x) for x in layers(pooled(method, batch), mlp(method.head))]
    bank, losses = filled(method.negatives.queue), []
    for s, t in zip(students, rows_of(batch.anchor_keys[0]), strict=True):
        assert max(dot(t, x) for x in bank) < dot(t, t) - 5e-3
        losses.append(-math.log(softmax([dot(s, x) / 0.2 for x in [t, *bank]])[0]))
    assert method(batch, Progress(0, 0))["loss"].item() == pytest.approx(mean(losses), rel=5e-5)


@pytest.mark.parametrize("own_normalisation", [False, True])
def test_seed_adds_the_mean_over_small_crops_against_a_queue_of_the_first_crop_of_each_image(own_normalisation):
    """As in the released code; here the queues are lists of the last 16 keys. From step 2 on, the method has been loaded from a
    checkpoint."""
    context = replace(make_context("live"), keys_TVP=None)
    changes = {"negatives": "queue", "negative_rows": 16, "small_crops": 3}
    method = build("seed", context, **changes)
    banks = [rows_of(part.queue.keys_QP) for part in (method.negatives, method.small_negatives)]
    for step in range(4):
        batch = make_batch(context, range(6 * step, 6 * step + 6), seed=step)
        batch.small_crops = torch.randn(3 * BATCH, 3, 4, 4) + torch.randn(3 * BATCH, 3, 1, 1)
        batch.live_small_crops = 2 * batch.small_crops + 1 if own_normalisation else None
        seen = batch.small_crops if batch.live_small_crops is None else batch.live_small_crops
        want, keys = [], []
        for images, for_teacher, bank in zip((batch.anchor_views[0], batch.small_crops), (batch.anchor_views[0], seen), banks, strict=True):
            keys.append(rows_of(context.teacher.keys(for_teacher)))
            students = layers(rows_of(method.student(images)), mlp(method.head))
            losses = []
            for s, t in zip(map(unit, students), keys[-1], strict=True):
                p = softmax([dot(t, x) / 0.3 for x in [t, *bank]])
                q = softmax([dot(s, x) / 0.2 for x in [t, *bank]])
                losses.append(-sum(x * math.log(y) for x, y in zip(p, q, strict=True)))
            want.append(mean(losses))
        got = method(batch, Progress(0, step))
        assert [got[name].item() for name in ("common_view", "small_crops")] == pytest.approx(want, rel=5e-5)
        assert got["loss"].item() == pytest.approx(sum(want), rel=5e-5)
        got["loss"].backward()
        method.after_step()
        banks = [[*(bank if step else []), *new[:BATCH]][-16:] for bank, new in zip(banks, keys, strict=True)]
        if step == 1:
            saved, method = method.state_dict(), build("seed", context, **changes)
            method.load_state_dict(saved)


def test_a_student_equal_to_the_teacher_has_the_smallest_loss():
    context = make_context()
    batch = make_batch(context)
    keys, features = F.normalize(batch.anchor_keys[0], dim=1), batch.anchor_features_BD  # float16 keys have unit length only to 3 digits
    batch.anchor_keys = [keys]
    simreg = build("simreg", context)
    simreg.head = Copy(0.5 * features)  # only the direction matters
    assert simreg(batch, Progress(0, 0))["loss"].item() == pytest.approx(0, abs=1e-6)
    one_queue = build("compress", context, queues=1)
    one_queue.head = Copy(2 * features)
    assert one_queue(batch, Progress(0, 0))["loss"].item() == pytest.approx(0, abs=1e-6)
    coss = build("coss", context, target="keys")
    coss.head = Copy(3 * keys)
    terms = coss(batch, Progress(0, 0))
    assert terms["loss"].item() == pytest.approx(-285.7142857, rel=1e-6)  # 2 / (0.07 x 0.1)
    assert (terms["sample"].item(), terms["dimension"].item()) == pytest.approx((-1, -1), rel=1e-6)
    seed = build("seed", context, student_temperature=0.2, teacher_temperature=0.2)
    seed.head = Copy(keys)
    loss = seed(batch, Progress(0, 0))["loss"]
    (gradient,) = torch.autograd.grad(loss, seed.head.output)
    assert gradient.abs().max() < 1e-6, "the cross-entropy is smallest if both rows of similarities are equal"


def test_coss_equals_its_formula_with_the_released_temperatures():
    """scripts/cf_train.sh: --t-temp 0.07 --s-temp 0.1 --l_0 1 --l_1 1.

    Outputs (3, 4) and (0, 5), the teacher's (1, 0) and (0, 1). Cosines image by image: 3/5 and 1, mean 0.8. Feature by feature: (3, 0)
    and (1, 0): 1; (4, 5) and (0, 1): 5/sqrt(41) = 0.78086881; mean 0.89043440. Sum 1.69043440, times 1/(0.07 x 0.1) = 142.857143.
    Gradient of cos(a, b) in a, b unit: (b - cos a/|a|) / |a|. Of the first image: (0.64, -0.48)/5 = (0.128, -0.096); of the second
    feature, for its first output: -0.78086881 x 4/sqrt(41) / sqrt(41) = -0.07618232; of the first feature 0. Halved (two images, two
    features), added and times -142.857143: (-9.1428571, 12.2987374).
    """
    context = make_context()
    batch = make_batch(context, (3, 4))
    batch.anchor_features_BD = torch.eye(2)
    method = build("coss", context)
    method.head = Copy(torch.tensor([[3.0, 4.0], [0.0, 5.0]]))
    loss = method(batch, Progress(0, 0))["loss"]
    (gradient,) = torch.autograd.grad(loss, method.head.output)
    assert loss.item() == pytest.approx(-241.490629, rel=1e-6)
    assert gradient[0].tolist() == pytest.approx([-9.1428571, 12.2987374], rel=1e-5)


@pytest.mark.parametrize("companions", [0, 1])
@pytest.mark.parametrize("groups", [1, 3])
def test_coss_compares_features_over_the_images_of_a_group(groups, companions):
    """Six anchors, or three followed by a companion each (companion i belongs to anchor i): the mean of the losses of each GPU."""
    context, anchors = make_context(), BATCH // (1 + companions)
    batch, method = make_batch(context), build("coss", context, companions=companions)
    with grouped_batchnorm(groups, anchors):
        got = method(batch, Progress(0, 0))["loss"].item()
    losses = []
    for group in np.split(np.arange(anchors), groups):
        own = torch.tensor([row + block * anchors for block in range(1 + companions) for row in group])
        part = Batch(batch.anchor_rows_B[own], [view[own] for view in batch.anchor_views])
        part.anchor_features_BD = batch.anchor_features_BD[own]
        losses.append(loop_coss(method, context, part, 0))
    assert got == pytest.approx(mean(losses), rel=1e-5)


def test_a_disco_student_at_the_teachers_keys_has_only_mocos_loss():
    context = make_context()
    batch = make_batch(context)
    batch.anchor_keys = [F.normalize(batch.anchor_keys[0], dim=1)] * 2
    method = build("disco", context)
    method.head = Copy(batch.anchor_keys[0])
    terms = method(batch, Progress(0, 0))
    assert terms["regression"].item() == pytest.approx(0, abs=1e-9)
    assert terms["loss"].item() == pytest.approx(terms["contrast"].item(), rel=1e-6)
    method.head = Copy(-batch.anchor_keys[0])
    assert method(batch, Progress(0, 0))["regression"].item() == pytest.approx(8, rel=1e-5), "two opposite unit vectors: 2 * 2^2"


def test_disco_with_batch_statistics_uses_those_of_each_view_and_group():
    torch.manual_seed(3)
    bn = lively(nn.BatchNorm2d(3))
    teacher = Teacher(nn.Sequential(bn, nn.AdaptiveAvgPool2d(1), nn.Flatten()), None, {"feature_width": 3, "key_width": 3})
    context = Context(**{**make_context("live").__dict__, "teacher": teacher, "keys_TVP": None})
    method, batch = build("disco", context, teacher_batchnorm="batch"), make_batch(context)
    with grouped_batchnorm(2, BATCH):
        got = method(batch, Progress(0, 0))["regression"].item()
    distances = []
    for view in batch.anchor_views:
        keys = []
        for x in view.split(BATCH // 2):
            mean, deviation = x.mean(dim=(0, 2, 3)), (x.var(dim=(0, 2, 3), correction=0) + bn.eps).sqrt()
            keys += rows_of(((x.mean(dim=(2, 3)) - mean) / deviation) * bn.weight + bn.bias)
        outputs = [unit(x) for x in layers(rows_of(method.student(view)), mlp(method.head))]
        distances += [sum((a - b) ** 2 for a, b in zip(s, unit(t), strict=True)) for s, t in zip(outputs, keys, strict=True)]
    assert got == pytest.approx(sum(distances) / BATCH, rel=1e-5)
    build("disco", context)
    assert not bn.training


# Cross-entropy and divergence of rows


@pytest.mark.parametrize("hidden_rows", [1, 5])
def test_losses_of_rows_and_their_gradients_equal_torchs_for_visible_columns(hidden_rows):
    """For visible columns, given as dense rows, F.cross_entropy and F.kl_div; hidden columns get no gradient at all."""
    torch.manual_seed(0)
    x, target = torch.randn(5, 9, dtype=torch.float64), 30 * torch.randn(5, 9, dtype=torch.float64)
    hidden = torch.rand(hidden_rows, 9) < 0.4
    hidden[:, 0] = False
    for ours, torchs in (
        (soft_cross_entropy, lambda a, p: F.cross_entropy(a[None], p[None])),
        (kl_divergence, lambda a, p: F.kl_div(a.log_softmax(0), p, reduction="sum")),
    ):
        for mask in (None, hidden):
            logits = x.clone().requires_grad_(True)
            got = ours(logits, target, mask)
            (gradient,) = torch.autograd.grad(got.sum(), logits)
            for i in range(5):
                seen = torch.ones(9, dtype=torch.bool) if mask is None else ~mask[i % hidden_rows]
                dense = x[i, seen].clone().requires_grad_(True)
                want = torchs(dense, target[i, seen].softmax(0))
                assert got[i].item() == pytest.approx(want.item(), abs=1e-10)
                wanted = torch.zeros(9, dtype=torch.float64)
                (wanted[seen],) = torch.autograd.grad(want, dense)
                torch.testing.assert_close(gradient[i], wanted, rtol=0, atol=1e-10)


def test_extreme_targets_give_no_nan():
    logits = torch.tensor([[30.0, -30.0, 1.0]], requires_grad=True)
    target, hidden = torch.tensor([[1e4, -1e4, 5e4]]), torch.tensor([[False, False, True]])
    for function in (soft_cross_entropy, kl_divergence):
        value = function(logits, target, hidden)
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert value.item() == pytest.approx(0, abs=1e-6)
        assert torch.isfinite(gradient).all()


# State


@pytest.mark.parametrize(("name", "changes"), [variant for variant in VARIANTS if variant[0] in ("seed", "compress", "disco", "isd")])
def test_keys_enter_the_queue_after_the_step_and_averages_move_by_their_momentum(name, changes):
    context = make_context()
    method, batch = build(name, context, **changes), make_batch(context)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    method(batch, Progress(0, 0))
    moved = [key for key, value in method.state_dict().items() if not torch.equal(value, before[key])]
    assert all(key.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked") for key in moved)
    pushed = {"negatives.queue": "keys", "teacher_queue": changes.get("target", "features"), "student_queue": "own", "queue": "own"}
    own = None
    if hasattr(method, "key_encoder"):
        view = 0 if name == "compress" else 1  # CompRess uses the same view for both
        own = F.normalize(method.key_encoder.network(batch.anchor_views[view]), dim=1).detach()
    with torch.no_grad():  # the optimizer's step
        trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter += 1
    method.after_step()
    known = {"keys": batch.anchor_keys[0], "features": batch.anchor_features_BD, "own": own}
    queues = [(name, module) for name, module in method.named_modules() if isinstance(module, Queue)]
    assert len(queues) == {"compress": changes.get("queues", 2), "seed": len(changes) // 2}.get(name, 1)
    for place, queue in queues:
        torch.testing.assert_close(queue.keys_QP[:BATCH], F.normalize(known[pushed[place]], dim=1), rtol=0, atol=2e-4)
        assert queue.rows_Q[:BATCH].tolist() == batch.anchor_rows_B.tolist()
        assert int(queue.pointer) == BATCH
    if own is not None:
        prefix, now = "key_encoder.network.", method.state_dict()
        inner = {"0.": "student.", "1.": "projector." if name == "isd" else "head."} if name != "compress" else {"": "student."}
        parameters = {key for key, _ in method.key_encoder.network.named_parameters()}
        assert parameters
        for key in parameters:
            start = next(part for part in inner if key.startswith(part))
            source = inner[start] + key.removeprefix(start)
            torch.testing.assert_close(now[prefix + key], 0.9 * before[prefix + key] + 0.1 * now[source], rtol=0, atol=1e-6)


def test_both_queues_of_compress_contain_the_same_images_in_the_same_places():
    context = make_context()
    method = build("compress", context)
    for seed, rows in enumerate([(3, 4, 9, 11, 20, 29), (1, 2, 3, 4, 5, 6)]):  # 12 keys in 10 places: the ring wraps
        method(make_batch(context, rows, seed), Progress(0, seed))
        method.after_step()
    assert method.teacher_queue.rows_Q.tolist() == method.student_queue.rows_Q.tolist() == [5, 6, 9, 11, 20, 29, 1, 2, 3, 4]


def test_no_gradient_reaches_a_moving_average_or_a_queue():
    context = make_context()
    for name in ("compress", "disco", "isd"):
        method = build(name, context)
        method(make_batch(context), Progress(0, 0))["loss"].backward()
        assert all(parameter.grad is None for parameter in method.key_encoder.parameters())
        assert all(parameter.grad is not None for parameter in method.student.parameters())


# User mistakes


@pytest.mark.parametrize("name", ["seed", "compress", "disco", "simreg", "coss"])
def test_a_method_with_a_teacher_refuses_momentum_keys(name):
    with pytest.raises(UserError, match=f"^distill.keys = momentum: {name} compares with a teacher; set distill.keys to") as caught:
        build(name, make_context("momentum"))
    assert "\n" not in str(caught.value)


def test_disco_refuses_a_single_stored_view():
    context = make_context()
    one_view = Context(**{**context.__dict__, "keys_TVP": context.keys_TVP[:, :1]})
    with pytest.raises(UserError, match=r"^extract\.views = 1: disco .* set extract\.views to 2 or more"):
        build("disco", one_view)
    build("seed", one_view)
    build("disco", Context(**{**make_context("live").__dict__, "keys_TVP": context.keys_TVP[:, :1]}))
