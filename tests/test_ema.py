"""WeightEMA: the arithmetic against a float64 reference, swapping, state, and what it refuses."""

import math

import pytest
import torch
from torch import nn

from hf_safe_ema import WeightEMA
from hf_safe_ema.decay import resolve_decays
from hf_safe_ema.ema import select_parameters


class Drifting:
    """A parameter whose float64 truth moves by a random walk with drift, rounded to its dtype at each step."""

    def __init__(self, drift: float, dtype: torch.dtype, size: int = 4096):
        generator = torch.Generator().manual_seed(0)
        self.generator = generator
        self.drift = drift
        self.truth = torch.randn(size, generator=generator, dtype=torch.float64) * 0.02
        self.parameter = nn.Parameter(self.truth.to(dtype))
        self.truth = self.parameter.detach().double()
        self.direction = torch.randn(size, generator=generator, dtype=torch.float64).sign()

    @torch.no_grad()
    def step(self) -> None:
        noise = torch.rand(self.truth.shape, generator=self.generator, dtype=torch.float64) * 2
        self.truth += self.drift * self.direction * noise
        self.parameter.copy_(self.truth.to(self.parameter.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drift", [1e-5, 1e-6, 1e-7])
def test_displacement_agrees_with_float64(drift, dtype):
    decays = [0.9, 0.99, 0.999, 0.9999]
    moving = Drifting(drift, dtype)
    start = moving.parameter.detach().double().clone()
    ema = WeightEMA([("w", moving.parameter)], decay=decays)
    references = [torch.zeros_like(start) for _ in decays]
    for _ in range(2000):
        moving.step()
        ema.update()
        for reference, decay in zip(references, decays, strict=True):
            reference.mul_(decay).add_(moving.parameter.detach().double() - start, alpha=1 - decay)
    for index, reference in enumerate(references):
        assert reference.norm() > 0
        error = (ema.displacement(index)["w"].double() - reference).norm() / reference.norm()
        assert error <= 1e-4


def two_layer_model(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10, bias=False)).to(dtype)
    model[2].weight = model[0].weight
    return model


@torch.no_grad()
def nudge(model: nn.Module, by: float = 0.125) -> None:
    for parameter in model.parameters():
        parameter.add_(by)


def test_closed_form_of_a_constant_move():
    model = two_layer_model(torch.float64)
    ema = WeightEMA(model.named_parameters(), decay=0.9, dtype=torch.float64)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    nudge(model, 1.0)
    for _ in range(5):
        ema.update()
    for name, averaged in ema.averaged_parameters():
        torch.testing.assert_close(averaged, before[name] + (1 - 0.9**5))
    assert ema.base_share == pytest.approx(0.9**5)
    count = sum(p.numel() for p in model.parameters())
    assert ema.distance_to_base() == pytest.approx((1 - 0.9**5) * math.sqrt(count))
    assert ema.distance_to_base("live") == pytest.approx(math.sqrt(count))


def test_tied_once_and_frozen_left_out():
    model = two_layer_model()
    model[1].bias.requires_grad_(False)
    ema = WeightEMA(model.named_parameters(remove_duplicate=False), decay=0.5)
    assert ema.names == ["0.weight", "1.weight"]


@pytest.mark.parametrize(
    ("include", "exclude", "names"),
    [
        ("1.*", None, ["1.weight", "1.bias"]),
        (None, "*.bias", ["0.weight", "1.weight"]),
        (["0.*", "1.*"], ["0.*", "*bias"], ["1.weight"]),
    ],
)
def test_name_patterns(include, exclude, names):
    assert list(select_parameters(two_layer_model().named_parameters(), include, exclude)) == names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_swap_restores_bits_and_addresses(dtype):
    model = two_layer_model(dtype)
    ema = WeightEMA(model.named_parameters(), decay=0.5)
    nudge(model, 0.3)
    with torch.no_grad():  # values that arithmetic would not keep
        model[1].bias.copy_(torch.tensor([math.nan, math.inf, -0.0, 1e-7]).to(dtype))
    ema.update()
    live = {name: p.detach().clone() for name, p in model.named_parameters()}
    addresses = [p.data_ptr() for p in model.parameters()]
    with ema.swapped_in():
        for name, averaged in ema.averaged_parameters():
            assert torch.equal(dict(model.named_parameters())[name].nan_to_num(), averaged.nan_to_num())
        assert model[2].weight is model[0].weight
    assert [p.data_ptr() for p in model.parameters()] == addresses
    for name, p in model.named_parameters():
        as_bits = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(p.detach().view(as_bits), live[name].view(as_bits))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, torch.OutOfMemoryError])
def test_swap_restores_under_any_exception(error):
    model = two_layer_model()
    ema = WeightEMA(model.named_parameters(), decay=0.5)
    nudge(model)
    live = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(error), ema.swapped_in():
        nudge(model, 5.0)
        raise error("from inside")
    assert all(torch.equal(p, kept) for p, kept in zip(model.parameters(), live, strict=True))
    ema.update()  # and it is usable again


def test_swap_restores_when_swapping_in_itself_fails():
    model = two_layer_model()
    ema = WeightEMA(model.named_parameters(), decay=0.5)
    nudge(model)
    live = [p.detach().clone() for p in model.parameters()]
    ema._displacements[0]["1.weight"] = torch.zeros(3, 3)  # the second tensor cannot be made
    with pytest.raises(RuntimeError), ema.swapped_in():
        pass
    assert all(torch.equal(p, kept) for p, kept in zip(model.parameters(), live, strict=True))


def test_entering_twice_says_so_and_leaves_the_outer_block_intact():
    model = two_layer_model()
    ema = WeightEMA(model.named_parameters(), decay=0.5)
    nudge(model)
    ema.update()
    live = [p.detach().clone() for p in model.parameters()]
    with ema.swapped_in():
        with pytest.raises(RuntimeError, match="entered twice"), ema.swapped_in():
            pass
        with pytest.raises(RuntimeError, match="swapped in"):
            ema.update()
        assert not torch.equal(model[1].weight, live[1])
    assert all(torch.equal(p, kept) for p, kept in zip(model.parameters(), live, strict=True))


def test_lookahead_sets_the_weights_every_sync_steps():
    model = two_layer_model()
    ema = WeightEMA(model.named_parameters(), decay=0.5, mode="lookahead", sync_steps=2)
    base = model[1].weight.detach().clone()
    nudge(model, 1.0)
    ema.update()
    torch.testing.assert_close(model[1].weight.detach(), base + 1.0)
    ema.update()
    torch.testing.assert_close(model[1].weight.detach(), base + 0.75)


def test_several_half_lives_are_the_averages_each_would_be_alone():
    model = two_layer_model()
    together = WeightEMA(model.named_parameters(), half_life=[2, 0.5], total_steps=20)
    alone = [WeightEMA(model.named_parameters(), half_life=2), WeightEMA(model.named_parameters(), half_life=10)]
    for _ in range(7):
        nudge(model)
        together.update()
        for ema in alone:
            ema.update()
    for index, ema in enumerate(alone):
        for (_, a), (_, b) in zip(together.averaged_parameters(index), ema.averaged_parameters(), strict=True):
            assert torch.equal(a, b)


def test_state_goes_round_and_continues_bit_equal():
    first, second = two_layer_model(), two_layer_model()
    ema = WeightEMA(first.named_parameters(), decay=[0.9, 0.99])
    for _ in range(3):
        nudge(first)
        ema.update()
    saved = ema.state_dict()
    saved = {**saved, "displacements": [{k: v.clone() for k, v in d.items()} for d in saved["displacements"]]}
    nudge(second, 9.0)  # a resumed run no longer starts from the base
    resumed = WeightEMA(second.named_parameters(), decay=[0.9, 0.99])
    resumed.load_state_dict(saved)
    second.load_state_dict(first.state_dict())
    for each, model in ((ema, first), (resumed, second)):
        nudge(model)
        each.update()
    assert resumed.num_updates == 4
    for index in (0, 1):
        for (_, a), (_, b) in zip(ema.averaged_parameters(index), resumed.averaged_parameters(index), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decays": [0.5]}, "decay"),
        ({"base": {}}, "other parameters"),
        ({"base": {"1.weight": torch.zeros(2)}}, "saved as"),
    ],
)
def test_state_of_another_run_is_refused_and_changes_nothing(change, message):
    layer = nn.Sequential(nn.Identity(), nn.Linear(2, 2, bias=False))
    ema = WeightEMA(layer.named_parameters(), decay=0.9)
    before = {k: v.clone() for k, v in ema.displacement().items()}
    with pytest.raises(ValueError, match=message):
        ema.load_state_dict({**ema.state_dict(), "num_updates": 7, **change})
    assert ema.num_updates == 0
    assert all(torch.equal(before[k], v) for k, v in ema.displacement().items())


def test_state_on_cpu_for_parameters_elsewhere_and_fp32_for_bf16():
    model = two_layer_model(torch.bfloat16)
    ema = WeightEMA(model.named_parameters(), decay=0.9, device="cpu")
    assert {t.dtype for t in ema.state_dict()["base"].values()} == {torch.bfloat16}
    assert {t.dtype for t in ema.displacement().values()} == {torch.float32}
    assert {t.device.type for t in ema.displacement().values()} == {"cpu"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 1.0}, r"\[0, 1\)"),
        ({"decay": -0.1}, r"\[0, 1\)"),
        ({"decay": 0.9, "half_life": 3}, "give one of them"),
        ({"half_life": 0}, "at least 1"),
        ({"half_life": 0.0}, "between 0 and 1"),
        ({"half_life": 1.5}, "between 0 and 1"),
        ({"half_life": 30, "total_steps": 20}, "longer than the run"),
        ({"half_life": 0.5}, "total_steps"),
        ({"half_life": []}, "empty"),
        ({"decay": 0.9, "mode": "sideways"}, "unknown"),
        ({"decay": 0.9, "mode": "lookahead"}, "needs sync_steps"),
        ({"decay": 0.9, "mode": "lookahead", "sync_steps": 0}, "at least 1"),
        ({"decay": 0.9, "sync_steps": 5}, "no meaning"),
        ({"decay": 0.9, "dtype": torch.bfloat16}, "float32"),
        ({"decay": 0.9, "include": "nothing*"}, "no trainable parameter matched"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightEMA(two_layer_model().named_parameters(), **arguments)


def test_all_frozen_is_refused():
    with pytest.raises(ValueError, match="frozen"):
        WeightEMA(two_layer_model().requires_grad_(False).named_parameters(), decay=0.9)


@pytest.mark.parametrize("value", ["0.5", None, True])
def test_half_life_of_the_wrong_type(value):
    with pytest.raises(TypeError):
        resolve_decays(half_life=[value])


def test_one_fraction_fits_runs_of_all_lengths():
    for steps in (10, 1000, 100_000):
        (decay,) = resolve_decays(half_life=0.25, total_steps=steps)
        assert decay**steps == pytest.approx(2**-4)
