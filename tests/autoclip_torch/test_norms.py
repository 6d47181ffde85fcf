"""The norms of gradients against float64, on both paths."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import hypothesis.extra.numpy as npst
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paths import histories_of, numpy_path
from torch import Tensor

from autoclip.torch import QuantileClip
from autoclip.torch._layout import Layout, norms
from autoclip.torch._layout.layout import Part

CPU = torch.device("cpu")
Measure = Callable[[Sequence["Tensor | None"]], npt.NDArray[np.float64]]


# More gradients than are measured one by one.
OTHERS = [torch.ones(1)] * 21


def of_few(gradients: Sequence[Tensor | None]) -> npt.NDArray[np.float64]:
    return np.asarray(part_of(gradients, True).norms.of(gradients))


def of_many(gradients: Sequence[Tensor | None]) -> npt.NDArray[np.float64]:
    together = [*gradients, *OTHERS]
    return of_few(together)[: len(gradients)]


def on_device(gradients: Sequence[Tensor | None]) -> npt.NDArray[np.float64]:
    return np.asarray(part_of(gradients, False).norms.of(gradients))


@pytest.fixture(params=[of_few, of_many], ids=["few", "many"], scope="module")
def on_cpu(request: pytest.FixtureRequest) -> Measure:
    """Norms of a few gradients in torch, or of many in NumPy."""
    chosen: Measure = request.param
    return chosen


@pytest.fixture(params=[of_few, of_many, on_device], ids=["few", "many", "device"])
def measure(request: pytest.FixtureRequest) -> Measure:
    """Norms in the CPU's memory, or by a device's operations on CPU tensors."""
    chosen: Measure = request.param
    return chosen


def exact(gradient: Tensor) -> float:
    """The norm in float64, of elements scaled so that no square leaves its range."""
    dense = gradient.to_dense().resolve_conj()
    if dense.is_complex():  # through complex128: of 16-bit complex numbers torch has little else
        dense = torch.view_as_real(dense.to(torch.complex128))
    values = dense.double().reshape(-1)
    largest = float(values.abs().max()) if values.numel() else 0.0
    return largest * float(((values / largest) ** 2).sum().sqrt()) if largest else 0.0


def normal(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=generator, dtype=wide).to(dtype)


# -- accuracy ----------------------------------------------------------------------------------


def test_forty_million_elements_and_an_outlier(on_cpu: Measure) -> None:
    gradient = normal((1000, 1000)).repeat(40, 1)
    square = 40 * float(gradient[:1000].double().square().sum())
    assert on_cpu([gradient])[0] == pytest.approx(math.sqrt(square), rel=1e-6)
    # One element that outweighs a tenth of the others: running sums lose what is beside it.
    square += 2000.0**2 - float(gradient[17, 3]) ** 2
    gradient[17, 3] = 2000.0
    assert on_cpu([gradient])[0] == pytest.approx(math.sqrt(square), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 4095, 2**18 + 1, 3_000_001])
@pytest.mark.parametrize("outlier", [None, 4096.0])
def test_float32_and_float64_on_the_cpu(
    on_cpu: Measure, dtype: torch.dtype, size: int, outlier: float | None
) -> None:
    gradient = normal((size,), dtype)
    if outlier is not None:
        gradient[size // 3] = outlier
    assert on_cpu([gradient])[0] == pytest.approx(exact(gradient), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex32])
@pytest.mark.parametrize("size", [1, 300, 2**18 + 7, 1_000_003])
@pytest.mark.parametrize("outlier", [None, 4096.0])
def test_sixteen_bits_on_the_cpu(
    on_cpu: Measure, dtype: torch.dtype, size: int, outlier: float | None
) -> None:
    gradient = normal((size,), dtype)
    if outlier is not None:
        gradient[size // 3] = outlier
    assert on_cpu([gradient])[0] == pytest.approx(exact(gradient), rel=1e-3)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
)
@pytest.mark.parametrize("size", [1, 255, 5000])
def test_device_operations(dtype: torch.dtype, size: int) -> None:
    gradient = normal((size,), dtype)
    assert on_device([gradient])[0] == pytest.approx(exact(gradient), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bits(measure: Measure, dtype: torch.dtype) -> None:
    gradient = normal((1000,)).to(dtype)
    assert measure([gradient, torch.zeros(3).to(dtype)]).tolist() == pytest.approx(
        [exact(gradient.float()), 0.0], rel=1e-5
    )


@given(npst.arrays(np.float32, st.integers(0, 600), elements=st.floats(-1e4, 1e4, width=32)))
def test_any_moderate_vector(on_cpu: Measure, values: npt.NDArray[np.float32]) -> None:
    gradient = torch.from_numpy(values)
    assert on_cpu([gradient])[0] == pytest.approx(exact(gradient), rel=1e-6)


@given(
    npst.arrays(
        st.sampled_from([np.float32, np.float64]),
        st.integers(1, 40),
        elements=st.floats(allow_nan=False, allow_infinity=False, width=32),
    )
)
def test_any_finite_vector_whatever_its_range(
    on_cpu: Measure,
    values: npt.NDArray[np.float32],
) -> None:
    gradient = torch.from_numpy(values)
    assert on_cpu([gradient])[0] == pytest.approx(exact(gradient), rel=1e-6)


# Subnormal squares, subnormal elements, squares beyond float32, and the ends of float64.
SIZES = {
    torch.float32: [1e-45, 1e-40, 1e-38, 1e-30, 1e-23, 1e-19, 1e17, 1e19, 1e30, 3e38],
    torch.float64: [5e-324, 1e-310, 1e-200, 1e-160, 1e-30, 1e30, 1e160, 1e300],
    torch.bfloat16: [1e-39, 1e-30, 1e30, 3e38],
    torch.float16: [6e-8, 1e-6, 6e4],
    torch.complex64: [1e-40, 1e-30, 1e30, 3e38],
}


@pytest.mark.parametrize(
    ("dtype", "size"), [(dtype, size) for dtype, sizes in SIZES.items() for size in sizes]
)
@pytest.mark.parametrize("count", [1, 1000])
def test_tiny_and_huge_elements_on_the_cpu(
    on_cpu: Measure, dtype: torch.dtype, size: float, count: int
) -> None:
    gradient = torch.full((count,), size, dtype=torch.float64).to(dtype)
    assert 0.0 < exact(gradient) < math.inf
    assert on_cpu([gradient])[0] == pytest.approx(exact(gradient), rel=1e-6)


def test_tiny_beside_huge_elements_on_the_cpu(on_cpu: Measure) -> None:
    gradient = torch.full((1000,), 1e-30)
    gradient[7] = 1e-10  # its square is a normal number, the others' are not
    assert on_cpu([gradient])[0] == pytest.approx(1e-10, rel=1e-6)
    gradient[8] = 1e30
    assert on_cpu([gradient])[0] == pytest.approx(1e30, rel=1e-6)


def test_a_finite_gradient_has_a_finite_norm_even_beyond_float64(measure: Measure) -> None:
    gradient = torch.full((100,), 1.7e308, dtype=torch.float64)
    assert 1.7e308 < measure([gradient])[0] < math.inf


@pytest.mark.parametrize("size", [1e-16, 1e-12, 1e12, 1e18])
def test_the_range_that_devices_are_exact_in(size: float) -> None:
    gradient = normal((1000,)) * np.float32(size / math.sqrt(1000))
    assert on_device([gradient])[0] == pytest.approx(exact(gradient), rel=1e-5)


# -- finite or not -----------------------------------------------------------------------------

DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 255, 256, 999])
def test_not_finite_exactly_if_an_element_is_not(
    measure: Measure, dtype: torch.dtype, bad: float, place: int
) -> None:
    clean, broken = normal((1000,), dtype), normal((1000,), dtype)
    broken[place] = bad
    finite = np.isfinite(measure([clean, broken, None, clean]))
    assert finite.tolist() == [True, False, True, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_finite_elements_are_finite(measure: Measure, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    gradient = torch.full((1000,), largest, dtype=dtype)
    assert torch.isfinite(gradient).all()
    assert np.isfinite(measure([gradient])).all()


def test_an_imaginary_nan_counts(measure: Measure) -> None:
    gradient = torch.complex(torch.ones(3), torch.tensor([0.0, math.nan, 0.0]))
    assert np.isnan(measure([gradient])[0])


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-23, 1e-19, 1e19, 1e30, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_devices_are_exact_where_squares_leave_float32(dtype: torch.dtype, size: float) -> None:
    gradient = torch.full((1000,), size).to(dtype)
    assert on_device([gradient])[0] == pytest.approx(exact(gradient), rel=1e-5)


# -- layouts -----------------------------------------------------------------------------------


def views() -> dict[str, Tensor]:
    base = normal((12, 34, 5, 6))
    return {
        "transposed": base.transpose(0, 1),
        "permuted": base.permute(3, 1, 0, 2),
        "channels last": base.contiguous(memory_format=torch.channels_last),
        "every third": base.view(-1)[::3],
        "inner slice": base[2:7, :, 1:4],
        "a column": base.view(-1, 40)[:, 11],
        "expanded": base[0, 0, 0].expand(100, 6),
        "0-d": base[1, 2, 3, 4],
        "transposed complex": normal((20, 30), torch.complex64).T,
        "conjugate": normal((20, 30), torch.complex64).conj(),
        "conjugate transpose": normal((20, 30), torch.complex128).mH,
        "imaginary part of a conjugate": normal((20, 30), torch.complex64).conj().imag,
        "real part": normal((20, 30), torch.complex64).real,
    }


@pytest.mark.parametrize("name", views())
def test_views(measure: Measure, name: str) -> None:
    gradient = views()[name]
    before = gradient.clone()
    assert measure([gradient])[0] == pytest.approx(exact(gradient), rel=1e-6)
    assert torch.equal(gradient, before)


@pytest.mark.parametrize("name", ["transposed", "channels last"])
@pytest.mark.parametrize("size", [64, 256])
def test_a_dense_gradient_in_another_order_is_not_copied(
    on_cpu: Measure, monkeypatch: pytest.MonkeyPatch, name: str, size: int
) -> None:
    """A copy of the largest gradient would double what a step needs of memory."""
    gradient = (
        normal((2, 2 * size, size)).transpose(0, 2)
        if name == "transposed"
        else normal((2, size, 2, size)).contiguous(memory_format=torch.channels_last)
    )
    assert not gradient.is_contiguous()
    pointers = []
    flat = norms._flat

    def spy(values: Tensor) -> Tensor:
        result = flat(values)
        pointers.append(result.data_ptr())
        return result

    monkeypatch.setattr(norms, "_flat", spy)
    assert on_cpu([gradient])[0] == pytest.approx(exact(gradient), rel=1e-6)
    assert pointers == [gradient.data_ptr()]


def sparse(dtype: torch.dtype, indices: list[list[int]], shape: tuple[int, ...]) -> Tensor:
    tail = shape[len(indices) :]
    values = normal((len(indices[0]), *tail), dtype)
    return torch.sparse_coo_tensor(torch.tensor(indices), values, shape, check_invariants=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.bfloat16])
@pytest.mark.parametrize("coalesced", [False, True])
def test_duplicate_indices_count_as_their_sum(
    measure: Measure, dtype: torch.dtype, coalesced: bool
) -> None:
    gradient = sparse(dtype, [[3, 1, 3, 3, 0]], (5, 7))
    if coalesced:
        gradient = gradient.coalesce()
    assert gradient.is_coalesced() is coalesced
    # torch adds the duplicates up in the gradient's own dtype.
    tolerance = 1e-2 if dtype is torch.bfloat16 else 1e-6
    assert measure([gradient])[0] == pytest.approx(exact(gradient), rel=tolerance)
    assert gradient.is_coalesced() is coalesced  # only read


def test_duplicates_that_cancel_have_no_norm(measure: Measure) -> None:
    gradient = torch.sparse_coo_tensor([[2, 2]], [1.5, -1.5], (4,), check_invariants=True)
    assert measure([gradient])[0] == 0.0


def test_other_sparse_layouts(measure: Measure) -> None:
    dense = normal((4, 6)) * (normal((4, 6), seed=1) > 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls the compressed layouts a beta
        gradients = [dense.to_sparse(), dense.to_sparse_csr(), dense.to_sparse_csc()]
    assert measure(gradients).tolist() == pytest.approx([exact(dense)] * 3, rel=1e-6)


def test_scalars_of_two_sparse_dimensions(measure: Measure) -> None:
    gradient = sparse(torch.float32, [[0, 1, 0], [2, 2, 2]], (3, 3))
    assert measure([gradient])[0] == pytest.approx(exact(gradient), rel=1e-6)


# -- lists -------------------------------------------------------------------------------------


def test_nothing_and_zeros(measure: Measure) -> None:
    empty = torch.sparse_coo_tensor(torch.empty(1, 0, dtype=torch.int64), torch.empty(0), (9,))
    gradients = [None, torch.zeros(0), torch.zeros(3, 0, 2), torch.zeros(5), empty]
    assert measure(gradients).tolist() == [0.0] * 5
    assert measure([None, None]).tolist() == [0.0, 0.0]
    assert measure([]).tolist() == []


def test_mixed_dtypes_and_layouts_keep_their_places(measure: Measure) -> None:
    gradients = [
        normal((300,), torch.float64),
        None,
        normal((7, 5), torch.bfloat16),
        normal((0,), torch.float16),
        sparse(torch.float32, [[3, 3, 0]], (5, 7)),
        normal((600,), torch.float16),
        normal((2, 3), torch.complex64),
        normal((1000,)) * 1e-30 if measure is not on_device else normal((1000,)),
        normal((1,)),
    ]
    expected = [0.0 if g is None else exact(g) for g in gradients]
    found = measure(gradients)
    assert found.dtype == np.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_a_gradient_measures_the_same_alone_and_among_others(on_cpu: Measure) -> None:
    gradients = [normal((size,), seed=size) for size in (1, 10, 256, 1000, 5000)]
    together = on_cpu(gradients)
    assert together.tolist() == [on_cpu([gradient])[0] for gradient in gradients]


def test_gradients_that_fill_several_buffers(on_cpu: Measure) -> None:
    """More small elements than are gathered at a time, of two dtypes, vectors and matrices."""
    gradients: list[Tensor | None] = []
    for k in range(300):
        dtype = torch.bfloat16 if k % 7 == 0 else torch.float32
        shape = (4000 + k % 3,) if k % 2 else (40 + k % 3, 100)
        gradients.append(normal(shape, dtype, seed=k) if k % 11 else None)
    gradients += [normal((300, 700 + k), seed=k) for k in range(3)]
    expected = [0.0 if g is None else exact(g) for g in gradients]
    for found in (on_cpu(gradients).tolist(), on_device(gradients).tolist()):
        assert found == pytest.approx(expected, rel=1e-5)


# -- plans -------------------------------------------------------------------------------------

CpuDtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
# Both sides of every limit: gathered or on its own, whole rows or not, NumPy's or torch's threads.
SHAPES = [(), (0,), (1,), (300,), (8, 8), (2**12,), (2**12 + 1,), (17, 512), (2**13 + 1,)]
Dense = st.builds(normal, st.sampled_from(SHAPES), CpuDtypes, st.integers(0, 5))
# Autograd negates lazily; so do views such as the imaginary part of a conjugate.
Gradient = st.none() | Dense | Dense.map(torch._neg_view)


def never(index: int) -> Tensor:
    raise AssertionError(f"gradient {index} shares no memory")


def part_of(gradients: Sequence[Tensor | None], numpy: bool) -> Part:
    with numpy_path(numpy):
        return Part.of(gradients, CPU, [i for i, g in enumerate(gradients) if g is not None])


def layout_of(gradients: Sequence[Tensor | None]) -> Layout:
    clipper = QuantileClip([torch.zeros(1, requires_grad=True) for _ in gradients])
    return Layout(gradients, clipper._groups, histories_of(clipper))


@given(
    st.lists(Gradient, max_size=12),
    st.lists(st.sampled_from([1.0, 0.5, 0.3, 1e-3]), min_size=12, max_size=12),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_a_part_measures_and_scales_like_one_gradient_at_a_time(
    gradients: list[Tensor | None], factors: list[float], numpy: bool, shared: bool, many: bool
) -> None:
    if many:
        gradients += [each.clone() for each in OTHERS]
        factors += [0.7] * len(OTHERS)
    part = part_of(gradients, numpy)
    coefficients = np.array(factors[:1] if shared else factors[: len(gradients)])
    before = [None if g is None else g.clone() for g in gradients]
    if isinstance(part.norms, norms.CpuNorms):
        found = part.norms.of(gradients)
        part.scaling.apply(gradients, coefficients, never)
    else:
        found = part.norms.of(gradients).numpy()
        part.scaling.apply(gradients, torch.from_numpy(coefficients), never)
    expected = [0.0 if g is None else exact(g) for g in before]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    for i, (gradient, original) in enumerate(zip(gradients, before)):
        if gradient is not None and original is not None:
            # One product in float32 at least, and one cast.
            wide = torch.float64 if original.dtype is torch.float64 else torch.float32
            factor = torch.tensor(coefficients[0 if shared else i], dtype=wide)
            assert torch.equal(gradient, (original.to(wide) * factor).to(original.dtype))


@pytest.mark.parametrize("numpy", [True, False])
def test_a_layout_is_used_again_and_again(numpy: bool) -> None:
    shapes = [(3,), (4, 5), (70000,), (513, 512), (40,)]
    made = [normal(shape) for shape in shapes]
    layout, part = layout_of(made), part_of(made, numpy)
    for step in range(4):
        gradients = [normal(shape, seed=step) for shape in shapes]
        assert layout.fits(gradients)
        coefficients = np.where(np.arange(5) == step, 0.5, 1.0)
        expected = [exact(g) * c for g, c in zip(gradients, coefficients)]
        if isinstance(part.norms, norms.CpuNorms):
            part.scaling.apply(gradients, coefficients, never)
            assert part.norms.of(gradients).tolist() == pytest.approx(expected, rel=1e-6)
        else:
            part.scaling.apply(gradients, torch.from_numpy(coefficients), never)
            assert part.norms.of(gradients).tolist() == pytest.approx(expected, rel=1e-6)


def test_what_a_layout_does_not_fit() -> None:
    gradients: list[Tensor | None] = [normal((6, 4)), None, normal((8,))]
    layout = layout_of(gradients)
    assert layout.fits([normal((6, 4), seed=1), None, normal((8,), seed=1)])
    assert layout.fits([normal((4, 6)).T, None, normal((16,))[::2]])
    for other in (
        [normal((6, 4)), None],
        [normal((6, 4)), None, None],
        [normal((6, 4)), normal((2,)), normal((8,))],
        [normal((4, 6)), None, normal((8,))],
        [normal((24,)), None, normal((8,))],
        [normal((6, 4), torch.float64), None, normal((8,))],
        [normal((6, 4)).to_sparse(), None, normal((8,))],
        [normal((6, 4)), None, normal((8,)).to("meta")],
        [normal((6, 4)), None, torch.nn.Parameter(normal((8,)))],
    ):
        assert not layout.fits(other)


@pytest.mark.parametrize("numpy", [True, False])
@pytest.mark.parametrize("name", views())
def test_views_are_scaled_in_place(numpy: bool, name: str) -> None:
    if name == "expanded":  # several elements in one place: torch writes to no such tensor
        return
    gradient = views()[name].clone(memory_format=torch.preserve_format)
    gradient = gradient if name in ("transposed", "channels last") else views()[name]
    before = gradient.resolve_conj().resolve_neg().clone()
    part = part_of([gradient, None], numpy)
    if isinstance(part.norms, norms.DeviceNorms):
        part.scaling.apply([gradient, None], torch.tensor([0.5, 0.5]), never)
    else:
        part.scaling.apply([gradient, None], np.array([0.5, 0.5]), never)
    assert torch.equal(gradient.resolve_conj().resolve_neg(), before * 0.5)


@pytest.mark.parametrize("numpy", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_other_layouts_and_dtypes_are_scaled(numpy: bool, shared: bool) -> None:
    gradients = [
        sparse(torch.float32, [[3, 3, 0]], (5, 7)),
        sparse(torch.bfloat16, [[3, 3, 0]], (5, 7)),
        normal((6, 4), torch.complex64),
        normal((), torch.complex128),
        normal((9,)).to(torch.float8_e5m2),
        torch.ones(()).to(torch.float8_e5m2),
    ]
    before = [exact(gradient.clone()) for gradient in gradients]
    part = part_of(gradients, numpy)
    coefficients = np.full(1 if shared else len(gradients), 0.5)
    if isinstance(part.norms, norms.CpuNorms):
        part.scaling.apply(gradients, coefficients, never)
    else:
        part.scaling.apply(gradients, torch.from_numpy(coefficients), never)
    expected = [0.5 * norm for norm in before]
    assert [exact(gradient) for gradient in gradients] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("numpy", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [10, 70000])
def test_tiny_coefficients_zero_no_gradient(numpy: bool, dtype: torch.dtype, size: int) -> None:
    gradient = torch.full((size,), 1e30).to(dtype)
    coefficient = 1e-42
    part = part_of([gradient, None], numpy)
    if isinstance(part.norms, norms.CpuNorms):
        part.scaling.apply([gradient, None], np.array([coefficient, 1.0]), never)
        assert gradient.double().tolist() == pytest.approx([1e-12] * size, rel=1e-2)
    else:
        part.scaling.apply([gradient, None], torch.tensor([coefficient, 1.0]).double(), never)
        assert (gradient > 0).all()


@pytest.mark.parametrize("numpy", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_only_broken_gradients_are_zeroed(numpy: bool, dtype: torch.dtype) -> None:
    gradients: list[Tensor | None] = [normal(s, dtype) for s in ((3,), (5, 4), (70000,), (70001,))]
    gradients.insert(1, None)
    gradients[2][1, 1] = math.nan  # type: ignore[index]
    gradients[4][7] = math.inf  # type: ignore[index]
    before = [None if g is None else g.clone() for g in gradients]
    part = part_of(gradients, numpy)
    broken = ~(part.norms.of(gradients) < math.inf)
    part.scaling.zero(gradients, broken, never)  # type: ignore[arg-type]
    for i in (0, 3):
        assert torch.equal(gradients[i], before[i])  # type: ignore[arg-type]
    for i in (2, 4):
        assert torch.count_nonzero(gradients[i]) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("numpy", [True, False])
def test_gradients_without_memory_are_left_alone(numpy: bool) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        gradients: list[Tensor | None] = [torch.ones(3), torch.ones(70000), None]
        part = part_of(gradients, numpy)
        found = part.norms.of(gradients)
        assert found.shape == (3,)
        coefficients = np.full(3, 0.5)
        part.scaling.apply(  # type: ignore[arg-type]
            gradients,
            coefficients if isinstance(part.norms, norms.CpuNorms) else torch.full((3,), 0.5),
            never,
        )
    # A layout of fake gradients is not one for real ones of the same shapes.
    assert not layout_of(gradients).fits([torch.ones(3), torch.ones(70000), None])
