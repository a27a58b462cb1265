"""Blocks: what can be bypassed, and why the rest cannot."""

import pytest
import torch
from networks import encoder, images, mlp, plain, residual, separable, sequences, vectors, zero_padded
from torch import nn
from torch.nn import functional as F

from secateurs.blocks import Block, find_blocks
from secateurs.certificate import certify
from secateurs.data import Dataset
from secateurs.errors import CertificateError
from secateurs.plan import DropBlock, Plan
from secateurs.surgery import applied


class Step(nn.Module):
    """A residual step; `shared` steps are the same module."""

    def __init__(self, width=12):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x):
        return x + F.relu(self.inner(x))


class Shared(nn.Module):
    """Three steps, of which two are one module."""

    def __init__(self):
        super().__init__()
        first, second = Step(), Step()
        self.steps = nn.ModuleList([first, second])
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.steps[1](self.steps[0](self.steps[0](x))))


class Numbered(nn.Module):
    """Blocks as numbered attributes, run in another order than they are defined."""

    def __init__(self):
        super().__init__()
        self.step2 = Step()
        self.step1 = Step()
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.step2(self.step1(x)))


class Exploding(nn.Module):
    """Without the first step, the network divides by zero."""

    def __init__(self):
        super().__init__()
        self.steps = nn.ModuleList([Step(), Step()])

    def forward(self, x):
        first = self.steps[0](x)
        same = (first == x).all()
        return self.steps[1](first / torch.where(same, 0.0, 1.0))


class Nested(nn.Module):
    """Blocks inside a block."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(Step(), Step())

    def forward(self, x):
        return x + self.body(x)


def table(blocks):
    return {block.path: (block.removable, block.reason) for block in blocks}


SHAPES = "its input has shape (8, 8, 8), its output (16, 4, 4)"
CASES = {
    "projection shortcuts": (
        residual,
        images,
        {"layers.0": (True, ""), "layers.1": (True, ""), "layers.2": (False, SHAPES), "layers.3": (True, "")},
    ),
    "zero-padded shortcuts": (
        zero_padded,
        images,
        {"layers.0": (True, ""), "layers.1": (True, ""), "layers.2": (False, SHAPES), "layers.3": (True, "")},
    ),
    "separable": (separable, images, {"1": (True, ""), "2": (True, "")}),
    "encoder": (encoder, sequences, {"layers.0": (True, ""), "layers.1": (True, "")}),
    "no residual path": (
        plain,
        images,
        {
            "0": (False, "its input has shape (3, 8, 8), its output (6, 8, 8)"),
            "2": (False, "its input has shape (6, 8, 8), its output (8, 4, 4)"),
        },
    ),
    "no blocks": (mlp, vectors, {}),
    "shared": (
        Shared,
        vectors,
        {
            "steps.0": (False, "it runs 2 times in one forward pass: its weights are shared"),
            "steps.1": (True, ""),
        },
    ),
    "numbered": (Numbered, vectors, {"step1": (True, ""), "step2": (True, "")}),
    "exploding": (
        Exploding,
        vectors,
        {"steps.0": (False, "the network returns NaN or infinite values without it"), "steps.1": (True, "")},
    ),
    "nested": (
        lambda: nn.Sequential(Nested(), Nested()),
        vectors,
        dict.fromkeys(("0.body.0", "0.body.1", "1.body.0", "1.body.1"), (True, "")),
    ),
}


@pytest.mark.parametrize(("build", "make", "expected"), CASES.values(), ids=CASES)
def test_blocks_in_order_of_execution(build, make, expected):
    blocks = find_blocks(build().eval(), make(4))
    assert table(blocks) == expected
    if build is not Shared:
        assert [block.path for block in blocks] == list(expected)


def test_a_projection_that_keeps_the_shape_is_not_a_residual_path():
    class Projected(nn.Module):
        def __init__(self, project):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)
            self.projection = nn.Conv2d(8, 8, 1) if project else nn.Identity()

        def forward(self, x):
            return F.relu(self.conv(x) + self.projection(x))

    model = nn.Sequential(nn.Conv2d(3, 8, 1), Projected(project=True), Projected(project=False))
    assert table(find_blocks(model.eval(), images(2))) == {
        "1": (False, "its input reaches its output only through layers with weights: a projection shortcut"),
        "2": (True, ""),
    }


def test_described_blocks_replace_the_search_and_are_checked():
    described = [Block("layers.2", True), Block("layers.1", True), Block("layers.0", False, "the plugin knows why")]
    blocks = find_blocks(residual(), images(2), lambda _: described)
    assert [block.path for block in blocks] == ["layers.2", "layers.1", "layers.0"]
    assert not blocks[0].removable
    assert blocks[0].reason.startswith("the network does not run without it")
    assert blocks[1].removable
    assert blocks[2] == described[2]


class Demanding(nn.Module):
    """Its steps return what they added, which the network asks for in its own way."""

    def __init__(self, demand):
        super().__init__()
        self.steps = nn.ModuleList([Telling(), Telling()])
        self.head = nn.Linear(12, 5)
        self.demand = demand

    def forward(self, x):
        for step in self.steps:
            x, added = step(x)
            if added is None:
                self.demand()
        return self.head(x)


class Telling(Step):
    """A step that also returns what it added."""

    def forward(self, x):
        added = F.relu(self.inner(x))
        return x + added, added


def _assert():
    raise AssertionError  # what `assert` raises; pytest would give one of its own a message


def _raise():
    raise ValueError


def _look_up():
    return {}["added"]


@pytest.mark.parametrize(
    ("demand", "said"),
    [(_assert, "AssertionError"), (_raise, "ValueError"), (_look_up, "'added'")],
    ids=["assert", "no message", "KeyError"],
)
def test_a_network_that_checks_its_blocks_itself_keeps_them(demand, said):
    model, data = Demanding(demand).eval(), vectors(8)
    blocks = find_blocks(model, data)
    assert [block.path for block in blocks] == ["steps.0", "steps.1"]
    assert not any(block.removable for block in blocks)
    assert all(block.reason.startswith("the network does not run without it: ") for block in blocks)
    assert all(said in block.reason for block in blocks)
    with pytest.raises(CertificateError, match=f"the masked original does not run: .*{said}"):
        certify(model, Plan(edits=(DropBlock(path="steps.0", elements=2),)), data)


def test_a_block_that_checks_its_layers_itself_has_no_residual_path():
    class Checked(Step):
        def forward(self, x):
            added = self.inner(x)
            assert bool(added.any())
            return x + added

    model = nn.Sequential(Checked(), Step())
    assert [block.path for block in find_blocks(model.eval(), vectors(4))] == ["1"]


def test_a_description_of_none_leaves_it_to_the_search():
    assert find_blocks(residual(), images(2), lambda _: None) == find_blocks(residual(), images(2))


def test_finding_blocks_leaves_no_trace():
    model = residual().train()
    random = torch.get_rng_state()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    find_blocks(model, images(2))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_dropped_block_is_not_found_again():
    model = residual()
    model.layers[1] = nn.Identity()
    assert "layers.1" not in table(find_blocks(model, images(2)))


def test_a_plain_stack_gives_up_convolutions_that_keep_the_shape():
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
    ]
    model = nn.Sequential(
        *layers, nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.Flatten(), nn.Linear(128, 5)
    ).eval()
    data = Dataset({"input": torch.randn(8, 3, 8, 8).numpy()})
    blocks = find_blocks(model, data)
    assert [(block.path, block.also, block.removable) for block in blocks] == [
        ("1", ("0",), False),
        ("4", ("3",), True),
        ("6", (), True),
        ("8", (), False),
    ]
    edit = DropBlock(path=blocks[1].path, also=blocks[1].also)
    certificate = certify(model, Plan(edits=(edit,)), data)
    assert certificate.max_abs == 0.0
    expected = nn.Sequential(*layers[:3], *list(model)[5:])
    with torch.no_grad():
        x = torch.from_numpy(data.inputs["input"])
        assert torch.equal(applied(model, Plan(edits=(edit,)))(x), expected(x))
