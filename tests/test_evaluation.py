import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.classes import prompts, read_classes
from evaluation.retrieval import recall, shared_captions
from evaluation.zero_shot import best_names, class_weights, nearest_neighbour_baseline, top_k

Make = Callable[[int, int], torch.Tensor]


def features(seed: int, rows: int, width: int = 16) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32))


def axis_features(seed: int, rows: int, width: int = 4) -> torch.Tensor:
    """Unit vectors along few axes: cosines are exactly -1, 0 or 1, so most of them tie."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(
        np.eye(width, dtype=np.float32)[rng.integers(width, size=rows)]
        * rng.choice(np.array([-1, 1], np.float32), (rows, 1))
    )


def slow_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    x, y = a.double().numpy(), b.double().numpy()
    return float((x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum()))


def slow_top_k(images: torch.Tensor, classes: torch.Tensor, labels: list[int], k: int) -> float:
    hits = 0
    for image, label in zip(images, labels, strict=True):
        own = slow_cosine(image, classes[label])
        above = [i for i in range(len(classes)) if i != label and slow_cosine(image, classes[i]) >= own - 1e-9]
        hits += len(above) < k
    return hits / len(images)


def first_right(scored: list[tuple[float, bool]]) -> int:
    """Returns the place of the first right answer when wrong ones go first among equal scores."""
    order = sorted(scored, key=lambda pair: (-round(pair[0], 9), pair[1]))
    return [right for _, right in order].index(True)


def slow_recall(images: torch.Tensor, texts: torch.Tensor, owners: list[int], k: int) -> tuple[float, float]:
    """Returns (image recall, text recall) by sorting every list of answers."""
    of_text = [
        first_right([(slow_cosine(image, text), i == owner) for i, image in enumerate(images)]) < k
        for text, owner in zip(texts, owners, strict=True)
    ]
    of_image = [
        first_right([(slow_cosine(images[i], text), owner == i) for text, owner in zip(texts, owners, strict=True)]) < k
        for i in sorted(set(owners))
    ]
    return sum(of_text) / len(of_text), sum(of_image) / len(of_image)


@pytest.mark.parametrize("make", [features, axis_features])
@pytest.mark.parametrize("seed", range(5))
def test_top_k_is_the_slow_count(make: Make, seed: int) -> None:
    images, classes = make(seed, 40), make(seed + 100, 12)
    labels = np.random.default_rng(seed).integers(12, size=40)
    found = top_k(images, classes, labels, ks=(1, 3, 5), batch_size=7)
    assert found == {f"zero_shot_top{k}": slow_top_k(images, classes, labels.tolist(), k) for k in (1, 3, 5)}


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 20), st.integers(1, 70))
def test_batch_size_length_and_order_change_nothing(seed: int, num: int, num_classes: int, batch_size: int) -> None:
    rng = np.random.default_rng(seed)
    images, classes, labels = features(seed, num), features(seed + 1, num_classes), rng.integers(num_classes, size=num)
    whole = top_k(images, classes, labels)
    assert top_k(images, classes, labels, batch_size=batch_size) == whole
    assert top_k(3 * images, 0.1 * classes, torch.from_numpy(labels)) == whole
    shuffled = rng.permutation(num)
    assert top_k(images[shuffled], classes, labels[shuffled]) == pytest.approx(whole)
    renamed = rng.permutation(num_classes)  # class c moves to row renamed[c]
    assert top_k(images, classes[np.argsort(renamed)], renamed[labels]) == whole


def test_what_cannot_be_told_apart_is_wrong() -> None:
    images, labels = features(0, 50, 512), np.arange(50) % 10
    same = features(1, 1, 512).expand(10, -1)
    assert top_k(images, same, labels, ks=(1, 9, 10)) == {
        "zero_shot_top1": 0, "zero_shot_top9": 0, "zero_shot_top10": 1,
    }  # fmt: skip
    assert top_k(torch.full_like(images, math.nan), features(2, 10, 512), labels)["zero_shot_top1"] == 0
    assert top_k(torch.zeros_like(images), features(2, 10, 512), labels)["zero_shot_top1"] == 0
    twins = torch.cat([images[:10], images[:1]])  # classes 0 and 10 are the same; the images are the classes
    assert top_k(images[:10], twins, np.arange(10))["zero_shot_top1"] == 0.9
    scores = recall(images, features(1, 1, 512).expand(50, -1), np.arange(50))
    assert scores["retrieval_text_r10"] == 0
    assert set(recall(torch.full_like(images, math.nan), images, np.arange(50)).values()) == {0}


@pytest.mark.parametrize(("apart", "top1"), [(1e-3, 0.0), (3e-3, 1.0)])  # cosines 5e-7 and 4.5e-6 apart
def test_a_difference_that_rounding_could_make_is_a_tie(apart: float, top1: float) -> None:
    images, classes = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, apart]])
    assert top_k(images, classes, [0])["zero_shot_top1"] == top1


def test_autocast_does_not_blur_the_scores() -> None:
    images, classes, labels = features(0, 300, 64), features(1, 200, 64), np.arange(300) % 200
    plain = top_k(images, classes, labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert top_k(images, classes, labels) == plain


def test_top_k_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"label 10 is not among the 10 classes \(0 to 9\); classnames.txt"):
        top_k(features(0, 3), features(1, 10), [0, 10, 2])
    with pytest.raises(ValueError, match="no labelled image"):
        top_k(features(0, 0), features(1, 10), np.zeros(0, np.int64))
    with pytest.raises(ValueError, match="no caption"):
        recall(features(0, 3), features(1, 0), np.zeros(0, np.int64))


def test_class_weights_are_the_mean_direction() -> None:
    prompt_features = 5 * features(0, 6)
    found = class_weights(prompt_features, 3)
    for i in range(3):
        rows = prompt_features[2 * i : 2 * i + 2].double().numpy()
        mean = sum(row / np.linalg.norm(row) for row in rows) / 2
        np.testing.assert_allclose(found[i].numpy(), mean / np.linalg.norm(mean), atol=1e-6)
    lengths = torch.rand(6, 1) + 0.1  # a prompt's length does not weigh
    torch.testing.assert_close(class_weights(lengths * prompt_features, 3), found)
    assert class_weights(prompt_features.bfloat16(), 6).dtype == torch.float32


def test_best_names_are_the_argmax_in_order() -> None:
    images, classes, names = features(0, 20), features(1, 9), [f"name {i}" for i in range(9)]
    best = best_names(images, classes, names, 4, logit_scale=20)
    for image, chosen in zip(images, best, strict=True):
        logits = [20 * slow_cosine(image, other) for other in classes]
        shares = [math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]
        order = sorted(range(9), key=lambda i: -shares[i])[:4]
        assert [name for name, _ in chosen] == [names[i] for i in order]
        assert [share for _, share in chosen] == pytest.approx([shares[i] for i in order], rel=1e-4)
    assert [len(chosen) for chosen in best_names(images, classes, names, 100)] == [9] * 20


@pytest.mark.parametrize("make", [features, axis_features])
@pytest.mark.parametrize("seed", range(4))
def test_recall_is_the_slow_sort(make: Make, seed: int) -> None:
    rng = np.random.default_rng(seed)
    asking = np.delete(np.arange(15), [3, 9])  # images 3 and 9 have no caption
    owners = np.concatenate([asking, rng.choice(asking, 20)])
    rng.shuffle(owners)
    images = make(seed, 15)
    texts = images[owners] + 0.7 * features(seed + 9, 33, images.shape[1]) if make is features else make(seed + 9, 33)
    found = recall(images, texts, owners, ks=(1, 2, 5), batch_size=4)
    for k in (1, 2, 5):
        slow = slow_recall(images, texts, owners.tolist(), k)
        assert (found[f"retrieval_image_r{k}"], found[f"retrieval_text_r{k}"]) == slow
    assert recall(images, texts, torch.from_numpy(owners), ks=(1, 2, 5)) == found
    order = rng.permutation(33)
    assert recall(images, texts[order], owners[order], ks=(1, 2, 5)) == pytest.approx(found)


def test_one_good_caption_of_several_is_enough() -> None:
    images = torch.eye(3)
    texts = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 0.1], [0, 0, 1]])  # the second misleads
    found = recall(images, texts, [0, 0, 1, 1, 2])
    assert found["retrieval_image_r1"] == 4 / 5
    assert found["retrieval_text_r1"] == 2 / 3  # image 2 finds the misleading caption as near as its own
    assert set(found) == {f"retrieval_{of}_r{k}" for of in ("image", "text") for k in (1, 5, 10)}


@pytest.mark.parametrize("seed", range(8))
def test_a_perfect_model_reaches_what_shared_captions_allow_and_no_more(seed: int) -> None:
    rng = np.random.default_rng(seed)
    owners = np.concatenate([np.arange(9), rng.integers(0, 9, 12)])
    words = rng.integers(0, 14, len(owners))
    # Image and text features of a model that knows which images a text stands at, and has a favourite among them.
    favourite = {word: int(np.bincount(owners[words == word]).argmax()) for word in set(words.tolist())}
    texts = torch.zeros(len(owners), 9)
    for row, word in enumerate(words.tolist()):
        texts[row, owners[words == word]] = 0.5
        texts[row, favourite[word]] = 1
    found = shared_captions([b"%d" % word for word in words], owners)
    assert found["num_shared_captions"] == sum(len(set(owners[words == word])) > 1 for word in words)
    scores = recall(torch.eye(9), texts, owners)
    assert scores["retrieval_image_r1"] == pytest.approx(found["retrieval_image_r1_limit"])
    # Texts that an image shares point away from it a little, so what it has alone comes first.
    alone = {int(owner) for owner, word in zip(owners, words, strict=True) if set(owners[words == word]) == {owner}}
    assert found["retrieval_text_r1_limit"] == len(alone) / 9
    assert scores["retrieval_text_r1"] == pytest.approx(found["retrieval_text_r1_limit"])


def test_without_shared_captions_there_is_no_limit() -> None:
    found = shared_captions([b"a", b"a", b"b"], [0, 0, 1])
    assert found == {"num_shared_captions": 0, "retrieval_image_r1_limit": 1, "retrieval_text_r1_limit": 1}


def brute_force(train: npt.NDArray[np.uint8], test: npt.NDArray[np.uint8]) -> list[int]:
    return [int(((train.astype(np.int64) - row.astype(np.int64)) ** 2).sum(axis=1).argmin()) for row in test]


@pytest.mark.parametrize("columns", [7, 1024, 3 * 2500])
@pytest.mark.parametrize("high", [2, 256])
def test_pixel_baseline_is_brute_force(columns: int, high: int) -> None:
    rng = np.random.default_rng(columns + high)
    train, test = (rng.integers(0, high, (num, columns), np.uint8) for num in (60, 25))
    labels, truth = rng.integers(0, 4, 60), rng.integers(0, 4, 25)
    slow = float((labels[brute_force(train, test)] == truth).mean())
    for batch_size in (1, 9, 1000):
        assert nearest_neighbour_baseline(train, labels, test, truth, batch_size=batch_size) == slow


def test_pixel_baseline_sees_one_grey_level_in_12288_pixels() -> None:
    # A distance of 1 under sums near 2**30: plain float32 cannot see it.
    near = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), 12288)
    twin = near.copy()
    twin[5000] ^= 1
    far = np.stack([twin, near])
    assert nearest_neighbour_baseline(far, [0, 1], far[::-1], [1, 0]) == 1
    assert nearest_neighbour_baseline(np.stack([near, near]), [0, 1], far, [0, 0], batch_size=1) == 1  # first counts


def test_classes_are_read_by_line(tmp_path: Path) -> None:
    (tmp_path / "classnames.txt").write_bytes("red apple\r\nflag: Côte d'Ivoire\na\u2028b\n\n".encode())
    assert read_classes(tmp_path) == (["red apple", "flag: Côte d'Ivoire", "a\u2028b"], ["{c}"])
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a photo of {c}.\n\n{c}, {drawn}\n")
    names, templates = read_classes(tmp_path)
    assert templates == ["a photo of {c}.", "{c}, {drawn}"]
    assert prompts(names[:2], templates) == [
        "a photo of red apple.", "red apple, {drawn}", "a photo of flag: Côte d'Ivoire.",
        "flag: Côte d'Ivoire, {drawn}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        (None, None, r"classnames\.txt is missing; write one class name a line"),
        (b"\n \n", None, r"classnames\.txt is empty; write"),
        (b"cat\n\ndog\n", None, r"classnames\.txt is blank at line 2; line n \(from 0\) names class n"),
        (b"\ncat\n", None, r"classnames\.txt is blank at line 1;"),
        (b"cat\xff\n", None, r"classnames\.txt is not UTF-8 at byte 3; save it as UTF-8"),
        (b"cat\n", b"", r"templates\.txt is empty; write a template a line, such as \{c\}"),
        (b"cat\n", b"{c}\na photo\n", r"templates\.txt has no \{c\} at line 2: 'a photo'; put \{c\} where"),
    ],
)
def test_malformed_classes_name_the_file_and_the_fix(
    tmp_path: Path, names: bytes | None, templates: bytes | None, message: str
) -> None:
    for name, content in (("classnames", names), ("zeroshot_classification_templates", templates)):
        if content is not None:
            (tmp_path / f"{name}.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_classes(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", range(4))
def test_of_classes_of_one_name_the_first_counts(seed: int) -> None:
    names = list("abcadeaf")  # three classes are a; all of a name have one vector, as prompts make them
    vectors = {name: features(seed + ord(name), 1)[0] for name in set(names)}
    classes, images = torch.stack([vectors[name] for name in names]), features(seed, 60)
    labels = np.random.default_rng(seed).integers(len(names), size=60)
    logits = images.double() @ normalized(classes).T
    order = np.argsort(-logits.numpy(), axis=1, kind="stable")
    found = top_k(images, classes, labels, ks=(1, 2, 5), names=names)
    expected = {k: np.mean([label in row[:k] for label, row in zip(labels, order, strict=True)]) for k in (1, 2, 5)}
    assert found == {f"zero_shot_top{k}": pytest.approx(value) for k, value in expected.items()}
    assert top_k(images, classes, labels, names=[*map(str, range(8))]) == top_k(images, classes, labels)


def normalized(vectors: torch.Tensor) -> torch.Tensor:
    return vectors.double() / vectors.double().norm(dim=1, keepdim=True)
