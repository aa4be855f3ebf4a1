"""ImageDataset: every supported form of an image gives the same float32 tensor, and errors name the sample."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from udddm.data import ArrayImages, BatchSource, ImageDataset, check_unchanged
from udddm.errors import DataError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 3, 6, 5), dtype=np.uint8)
EXPECTED = torch.from_numpy(PIXELS).float() / 127.5 - 1


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


class Wrapped:
    """A user's data set, whose images are converted by `form`."""

    def __init__(self, form: Any = lambda image: image, labels: Any = None, images: Any = PIXELS) -> None:
        self.form, self.labels, self.images = form, labels, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        image = self.form(self.images[index])
        return image if self.labels is None else (image, self.labels[index])


FORMS: dict[str, Any] = {
    "uint8 array": lambda image: image,
    "uint8 tensor": lambda image: torch.from_numpy(image.copy()),
    "uint8 [H, W, C] array": lambda image: image.transpose(1, 2, 0),
    "uint8 [H, W, C] tensor": lambda image: torch.from_numpy(image.transpose(1, 2, 0).copy()),
    "PIL": lambda image: Image.fromarray(image.transpose(1, 2, 0)),
    "float32 tensor": lambda image: torch.from_numpy(image.copy()).float() / 127.5 - 1,
    "tensor with a gradient": lambda image: (torch.from_numpy(image.copy()).float() / 127.5 - 1).requires_grad_(),
    "float64 array": lambda image: image / 127.5 - 1,
    "big-endian float32": lambda image: (image / np.float32(127.5) - np.float32(1)).astype(">f4"),
    "negative strides": lambda image: image[:, ::-1].copy()[:, ::-1],
    "a tuple of one": lambda image: (image,),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_image_gives_the_same_batch(form: str) -> None:
    dataset = ImageDataset(Wrapped(FORMS[form]))
    assert (len(dataset), dataset.shape, dataset.labelled, dataset.classes) == (20, (3, 6, 5), False, None)
    images, labels = dataset.batch(ids(3, 19, 3, 0))
    assert labels is None
    assert images.dtype == torch.float32 and images.device.type == "cpu" and images.is_contiguous()
    torch.testing.assert_close(images, EXPECTED[[3, 19, 3, 0]], rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_floats_are_widened(dtype: torch.dtype) -> None:
    images, _ = ImageDataset(Wrapped(lambda image: (torch.from_numpy(image) / 127.5 - 1).to(dtype))).batch(ids(1))
    assert torch.equal(images, EXPECTED[[1]].to(dtype).float())


def test_uint8_covers_exactly_minus_one_to_one() -> None:
    images, _ = ImageDataset(np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)).batch(ids(0))
    assert torch.equal(images.flatten(), torch.arange(256).float() / 127.5 - 1)
    assert (images.min(), images.max()) == (-1, 1)


@pytest.mark.parametrize(
    ("mode", "channels"), [("L", 1), ("1", 1), ("LA", 1), ("RGB", 3), ("P", 3), ("CMYK", 3), ("RGBA", 3)]
)
def test_pil_modes_give_their_channels(mode: str, channels: int) -> None:
    picture = Image.fromarray(PIXELS[0].transpose(1, 2, 0)).convert(mode)
    assert ImageDataset([picture]).shape == (channels, 6, 5)


def test_a_palette_with_transparency_is_read_quietly() -> None:
    picture = Image.new("P", (4, 4))
    picture.info["transparency"] = b"\x00\x7f"
    assert ImageDataset([picture]).shape == (3, 4, 4)


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_deep_pil_images_are_refused(mode: str) -> None:
    with pytest.raises(DataError, match="sample 0 has more than 8 bits"):
        ImageDataset([Image.new(mode, (4, 4))])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((6, 5), (1, 6, 5)),
        ((6, 5, 1), (1, 6, 5)),
        ((3, 5, 3), (3, 5, 3)),
        ((16, 4, 4), (16, 4, 4)),
        ((7, 6, 5), (7, 6, 5)),
    ],
)
def test_uint8_layouts(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert ImageDataset([np.zeros(shape, np.uint8)]).shape == expected
    assert ImageDataset(np.zeros((2, *shape), np.uint8)).shape == expected


def test_an_array_or_tensor_is_a_data_set() -> None:
    for whole in (PIXELS, torch.from_numpy(PIXELS), EXPECTED, EXPECTED.double().numpy()):
        images, labels = ImageDataset(whole).batch(ids(5, 2))
        assert labels is None
        torch.testing.assert_close(images, EXPECTED[[5, 2]], rtol=0, atol=1e-7)


@given(st.lists(st.integers(0, 19), max_size=30))
def test_batch_and_single_reads_agree(numbers: list[int]) -> None:
    labels = np.arange(20) % 7
    single, whole = ImageDataset(Wrapped(labels=labels)), ImageDataset(ArrayImages(PIXELS, labels))
    for dataset in (single, whole):
        images, got = dataset.batch(ids(*numbers))
        assert torch.equal(images, EXPECTED[numbers])
        assert got is not None and got.dtype == np.int64
        assert got.tolist() == labels[numbers].tolist()


def test_a_batch_does_not_alias_the_data() -> None:
    floats = EXPECTED.numpy().copy()
    ImageDataset(floats).batch(np.arange(20))[0].zero_()
    ImageDataset(list(floats)).batch(np.arange(20))[0].zero_()
    assert np.array_equal(floats, EXPECTED.numpy())


def test_read_only_arrays_are_read_quietly() -> None:
    frozen = PIXELS.copy()
    frozen.flags.writeable = False
    assert torch.equal(ImageDataset(list(frozen)).batch(ids(4))[0], EXPECTED[[4]])


@pytest.mark.parametrize("wrong", [(-1,), (20,), (0, 25)])
def test_an_id_out_of_range_does_not_wrap_around(wrong: tuple[int, ...]) -> None:
    with pytest.raises(IndexError, match="of a data set of 20 samples"):
        ImageDataset(PIXELS).batch(ids(*wrong))


def replaced(index: int, value: Any) -> list[Any]:
    images: list[Any] = list(EXPECTED.numpy())
    images[index] = value
    return images


MISTAKES = {
    "uneven shapes": (np.zeros((3, 6, 4), np.uint8), "sample 7 is 3x6x4, but sample 0 is 3x6x5"),
    "NaN": (np.full((3, 6, 5), np.nan, np.float32), "sample 7 contains NaN or infinite"),
    "infinity": (np.full((3, 6, 5), np.inf, np.float32), "sample 7 contains NaN or infinite"),
    "0..255 as floats": (np.full((3, 6, 5), 255.0), r"sample 7 has values in \[255, 255\]: scale float images"),
    "integers": (np.zeros((3, 6, 5), np.int64), "sample 7 has dtype int64: give uint8"),
    "booleans": (np.zeros((3, 6, 5), bool), "sample 7 has dtype bool: give uint8"),
    "complex": (np.zeros((3, 6, 5), complex), "sample 7 has dtype complex128: give uint8"),
    "float [H, W, C]": (np.zeros((6, 5, 3)), r"sample 7 has shape \[6, 5, 3\]: give float images as \[C, H, W\]"),
    "four dimensions": (np.zeros((1, 3, 6, 5)), r"sample 7 has shape \[1, 3, 6, 5\]"),
    "a string": ("cat.png", "sample 7 is a str: give a torch tensor"),
    "nothing": (None, "sample 7 is a NoneType: give a torch tensor"),
    "a mapping": ({"image": 1, "label": 2}, "sample 7 is a mapping with the keys 'image', 'label'"),
    "three things": ((1, 2, 3), "sample 7 is a tuple of length 3"),
    "a label": ((PIXELS[7], 1), "sample 7 has a label, but sample 0 has none"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_sample_is_named(mistake: str) -> None:
    value, message = MISTAKES[mistake]
    dataset = ImageDataset(replaced(7, value))
    dataset.batch(ids(6, 8))
    with pytest.raises(DataError, match=message):
        dataset.batch(ids(6, 7))


@pytest.mark.parametrize("value", [np.nan, -np.inf, 1.5])
def test_a_wrong_sample_of_an_array_is_named(value: float) -> None:
    images = EXPECTED.numpy().copy()
    images[7, 1, 2, 3] = value
    with pytest.raises(DataError, match="sample 7 "):
        ImageDataset(images).batch(ids(6, 7, 8))


def test_rounding_beyond_one_is_clamped() -> None:
    images, _ = ImageDataset(np.full((1, 1, 2, 2), 1.0078, np.float32)).batch(ids(0))
    assert torch.equal(images, torch.ones(1, 1, 2, 2))


LABELS = {
    "missing": (None, "sample 7 has no label"),
    "float": (1.0, "labels of sample 7 have dtype float64"),
    "text": ("cat", "labels of sample 7 have dtype <U3"),
    "negative": (-1, r"labels of sample 7 are in -1..-1"),
    "too great": (10, "labels of sample 7 are in 10..10: give integers from 0 to 9"),
    "one-hot": (np.eye(10)[3], r"label of sample 7 has shape \[10\]"),
}


@pytest.mark.parametrize("mistake", LABELS)
def test_a_wrong_label_is_named(mistake: str) -> None:
    value, message = LABELS[mistake]
    source = Wrapped(labels=[value if i == 7 else i % 10 for i in range(20)])
    source.classes = 10  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=message):
        ImageDataset(source).batch(ids(7))


@pytest.mark.parametrize("label", [3, np.int32(3), np.uint8(3), torch.tensor(3), torch.tensor([3]), np.array(3)])
def test_any_integer_is_a_label(label: Any) -> None:
    _, labels = ImageDataset(Wrapped(labels=[label] * 20)).batch(ids(0, 1))
    assert labels is not None and labels.dtype == np.int64 and labels.tolist() == [3, 3]


def test_classes_come_from_a_number_or_a_list_of_names() -> None:
    for classes, expected in ((7, 7), (["cat", "dog"], 2), (None, None), ("cat", None)):
        source = Wrapped(labels=[1] * 20)
        source.classes = classes  # type: ignore[attr-defined]
        assert ImageDataset(source).classes == expected


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(5, np.int64), r"shape \[5\], but there are 20 images"),
        (np.zeros(20), "have dtype float64"),
        (np.full(20, -1), "are in -1..-1"),
        (np.full(20, 4), "give integers from 0 to 3"),
    ],
)
def test_wrong_labels_of_an_array(labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ArrayImages(PIXELS, labels, classes=4)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "is empty"),
        (np.zeros((0, 1, 2, 2), np.uint8), "is empty"),
        ({0: PIXELS[0]}, "is a dict, not a sequence"),
        (iter([1]), "without __len__ and __getitem__"),
        (5, "is a int without"),
        (np.zeros((3, 4)), r"has shape \[3, 4\]"),
        (np.zeros((3, 4, 5), np.int32), "has dtype int32"),
    ],
)
def test_objects_that_are_not_data_sets_are_refused(source: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ImageDataset(source)


def test_a_method_named_batch_is_not_called() -> None:
    class Other(Wrapped):
        def batch(self, batch_size: int) -> None:
            raise AssertionError("this method means something else")

    assert torch.equal(ImageDataset(Other()).batch(ids(2))[0], EXPECTED[[2]])


def test_a_batch_source_with_wrong_rows_is_refused() -> None:
    class Short(BatchSource):
        def __len__(self) -> int:
            return 4

        def batch(self, ids: np.ndarray) -> Any:
            return PIXELS[:1], None

    with pytest.raises(DataError, match=r"a batch of 2 images of 3x6x5 has shape \[1, 3, 6, 5\]"):
        ImageDataset(Short()).batch(ids(0, 1))


def test_a_users_exception_keeps_its_type_and_names_the_sample() -> None:
    def broken(image: Any) -> Any:
        raise KeyError("pixels")

    with pytest.raises(KeyError) as caught:
        ImageDataset(Wrapped(broken))
    assert caught.value.__notes__ == ["while reading sample 0 of the data set"]


def test_a_users_object_is_read_by_one_thread_at_a_time() -> None:
    inside = threading.Semaphore(1)

    def alone(image: Any) -> Any:
        assert inside.acquire(blocking=False), "two threads in __getitem__"
        threading.Event().wait(0.001)
        inside.release()
        return image

    dataset = ImageDataset(Wrapped(alone))
    with ThreadPoolExecutor(4) as pool:
        for images, _ in pool.map(dataset.batch, [np.arange(20)] * 8):
            assert torch.equal(images, EXPECTED)


def test_a_source_can_be_iterated() -> None:
    source = ArrayImages(PIXELS, np.arange(20))
    assert [label for _, label in source] == list(range(20))
    with pytest.raises(IndexError):
        source[20]


def test_fingerprint_is_the_same_for_every_form_and_survives_json() -> None:
    labels = np.arange(20)
    mark = ImageDataset(ArrayImages(PIXELS, labels)).fingerprint()
    assert mark["length"] == 20 and mark["shape"] == [3, 6, 5]
    check_unchanged(json.loads(json.dumps(mark)), ImageDataset(Wrapped(FORMS["PIL"], labels)).fingerprint())


@pytest.mark.parametrize("index", [0, 19])
def test_the_fingerprint_covers_the_first_and_last_sample(index: int) -> None:
    changed = PIXELS.copy()
    changed[index, 0, 0, 0] ^= 1
    with pytest.raises(DataError, match="contents of its samples differ"):
        check_unchanged(ImageDataset(PIXELS).fingerprint(), ImageDataset(changed).fingerprint())


@pytest.mark.parametrize(
    ("current", "message"),
    [
        (PIXELS[:10], "it had 20 samples and now has 10; restore"),
        (PIXELS[:, :1], "its images were 3x6x5 and now are 1x6x5; restore"),
        (PIXELS[:4, :, :4], "it had 20 samples and now has 4; its images were 3x6x5 and now are 3x4x5; restore"),
        (PIXELS[::-1], "order"),
    ],
)
def test_a_changed_data_set_is_described(current: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_unchanged(ImageDataset(PIXELS).fingerprint(), ImageDataset(current).fingerprint())


def test_changed_labels_change_the_fingerprint() -> None:
    marks = [ImageDataset(ArrayImages(PIXELS, labels)).fingerprint() for labels in (None, [0] * 20, [1] * 20)]
    for before, now in ((0, 1), (1, 2)):
        with pytest.raises(DataError, match="labels"):
            check_unchanged(marks[before], marks[now])


def test_random_transforms_have_no_digest_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    dataset = ImageDataset(Wrapped(lambda image: image + RNG.integers(0, 9, image.shape, dtype=np.uint8)))
    mark = dataset.fingerprint()
    assert mark["digest"] is None
    assert "random transform" in caplog.text
    check_unchanged(mark, dataset.fingerprint())


def test_images_that_seem_scaled_to_zero_one_cause_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    ImageDataset(EXPECTED).fingerprint()
    assert not caplog.records
    ImageDataset(EXPECTED / 2 + 0.5).fingerprint()
    assert "scale them to [-1, 1]" in caplog.text
