"""The endless stream of samples: a function of (seed, step) alone, whatever the batch, the processes, the workers."""

import itertools
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from unit_parts import start_run, training_set

SQUARE, WIDE, TALL = (64, 64), (64, 128), (128, 64)
# 3 wide, 9 square and 6 tall samples, mixed: shares 1 : 3 : 2, six micro-batches in a cycle
MIXED = [WIDE, SQUARE, TALL, SQUARE, SQUARE, TALL] * 3


def batches(stream, count: int) -> list[list[tuple[int, int]]]:
    """The next `count` micro-batches."""
    return list(itertools.islice(stream, count))


def drawn(micro_batches) -> list[int]:
    """The sample indices, in order."""
    return [index for batch in micro_batches for index, _ in batch]


def make(script, targets=MIXED, batch=1, seed=0, stream="instance", **options):
    """A stream over samples of these sizes."""
    return script.SampleStream(targets, batch, seed, stream, **options)


# ---- generators ----


def test_the_generator_of_a_purpose_never_changes(script):
    """A golden number: runs of earlier versions must stay repeatable."""
    assert script.make_generator(0, "instance", "noise", 7).initial_seed() == 5960012207602224127
    drawn = torch.rand(1, generator=script.make_generator(0, "instance", "noise", 7)).item()
    assert drawn == pytest.approx(0.0092603, abs=1e-7)


def test_another_seed_purpose_or_position_is_another_generator(script):
    """Also when the parts read the same written one after the other."""
    keys = [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a", 11), (0, "a1", 1), (0, "a"), (0, "a", "1", 1)]
    seeds = {script.make_generator(*key).initial_seed() for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


# ---- the order of samples ----


@pytest.mark.parametrize("first", [1, 5, 6, 23])
def test_a_stream_that_starts_at_step_k_equals_one_that_was_read_up_to_k(script, first):
    """Resume needs nothing but the step number."""
    whole = batches(make(script, batch=2), 60)
    assert batches(make(script, batch=2, first=first), 60 - first) == whole[first:]


def test_a_micro_batch_does_not_depend_on_what_was_asked_before(script):
    """Read backwards, and by a second stream of another seed in between."""
    stream, other = make(script, batch=2), make(script, batch=2, seed=1)
    forwards = [stream.micro_batch(step) for step in range(30)]
    backwards = []
    for step in reversed(range(30)):
        other.micro_batch(step)
        backwards.append(stream.micro_batch(step))
    assert backwards[::-1] == forwards


def test_another_seed_and_another_stream_draw_another_order(script):
    """Class images must not follow the order of the instance images."""
    orders = [drawn(batches(make(script, **key), 36)) for key in ({}, {"seed": 1}, {"stream": "class"})]
    assert orders[0] != orders[1] and orders[0] != orders[2] and orders[1] != orders[2]


def test_every_round_has_an_order_of_its_own(script):
    """Permutations are drawn anew."""
    order = drawn(batches(make(script, targets=[SQUARE] * 10), 40))
    rounds = [tuple(order[i : i + 10]) for i in range(0, 40, 10)]
    assert len(set(rounds)) == 4


@pytest.mark.parametrize("batch", [1, 2, 3, 9])
@pytest.mark.parametrize("rounds", [1, 4])
def test_after_k_rounds_every_sample_was_seen_k_times_per_drawn_batch_size(script, batch, rounds):
    """One size: after k x n / batch micro-batches each of the n samples came k times."""
    stream = make(script, targets=[SQUARE] * 9, batch=batch)
    seen = Counter(drawn(batches(stream, rounds * 9)))  # batch rounds of nine samples, `rounds` times
    assert seen == dict.fromkeys(range(9), rounds * batch)


def test_within_a_round_no_sample_comes_twice(script):
    """Each stretch of n draws of a bucket is a permutation, also across the borders of batches."""
    order = drawn(batches(make(script, targets=[SQUARE] * 7, batch=3), 21))
    for start in range(0, 63, 7):
        assert sorted(order[start : start + 7]) == list(range(7))


def test_nothing_is_dropped_when_a_batch_is_larger_than_its_bucket(script):
    """The batch goes on into the next rounds: it is always full, and the counts differ by at most one."""
    micro_batches = batches(make(script, targets=[SQUARE] * 3, batch=8), 5)
    assert all(len(batch) == 8 for batch in micro_batches)
    counts = Counter(drawn(micro_batches))
    assert set(counts) == {0, 1, 2} and max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("batch", [1, 4])
def test_buckets_come_in_proportion_to_their_size(script, batch):
    """In every cycle exactly, so that a sample of a small bucket is seen as often as one of a large one."""
    stream = make(script, batch=batch)
    for cycle in range(5):
        micro_batches = [stream.micro_batch(6 * cycle + step) for step in range(6)]
        assert Counter(MIXED[b[0][0]] for b in micro_batches) == {WIDE: 1, SQUARE: 3, TALL: 2}
    seen = Counter(drawn(batches(stream, 6 * 3 * 3)))  # three cycles are one round of each bucket at batch 1
    assert seen == dict.fromkeys(range(18), 3 * batch)


def test_the_buckets_of_a_cycle_are_mixed(script):
    """Not all of one size and then all of the next: neighbours differ more often than in blocks."""
    targets = [SQUARE] * 30 + [WIDE] * 30
    stream = make(script, targets=targets[:])
    stream.shares = (30, 30)  # a long cycle
    sizes = [targets[stream.micro_batch(step)[0][0]] for step in range(60)]
    assert sum(a != b for a, b in itertools.pairwise(sizes)) > 40


@pytest.mark.parametrize("batch, processes", [(1, 1), (4, 1), (3, 2)])
def test_a_batch_holds_one_geometry(script, batch, processes):
    """Over all processes: they share the position ids of the first sample."""
    streams = [make(script, batch=batch, process_index=index, processes=processes) for index in range(processes)]
    for parts in itertools.islice(zip(*streams, strict=True), 50):
        assert len({MIXED[index] for part in parts for index, _ in part}) == 1


@pytest.mark.parametrize("batch, processes", [(2, 2), (1, 4)])
def test_batch_and_processes_are_exchangeable(script, batch, processes):
    """4 x 1, 2 x 2 and 1 x 4 draw the same samples at the same positions, in the order of the processes."""
    streams = [make(script, batch=batch, process_index=index, processes=processes) for index in range(processes)]
    joined = [[pair for part in parts for pair in part] for parts in itertools.islice(zip(*streams, strict=True), 40)]
    assert joined == batches(make(script, batch=4), 40)


def test_positions_count_the_drawn_samples(script):
    """0, 1, 2, ...: none comes twice, which is what keys noise and sigma."""
    positions = [position for batch in batches(make(script, batch=3), 20) for _, position in batch]
    assert positions == list(range(60))


def test_accumulation_with_one_bucket_draws_the_same_samples(script):
    """Four micro-batches of one equal one of four."""
    ones = batches(make(script, targets=[SQUARE] * 5), 40)
    fours = batches(make(script, targets=[SQUARE] * 5, batch=4), 10)
    assert [pair for batch in ones for pair in batch] == [pair for batch in fours for pair in batch]


# ---- one visit ----


@pytest.fixture(scope="module")
def samples(script, tiny, photos, reference_flags, tmp_path_factory) -> list:
    """The five photographs, with references where the script has them, as checked samples at 64 x 64."""
    data = ("--instance_data_dir", photos, *reference_flags)
    run = start_run(script, tiny, tmp_path_factory.mktemp("samples"), *data)
    rows = [replace(one, captions=(f"caption of {one.image.name}",)) for one in script.list_samples(run.args)]
    return script.make_samples(run, rows)


@pytest.fixture(scope="module")
def open_set(script, tiny, samples, tmp_path_factory):
    """`open_set(*flags)` is a TrainingSet of its own over the five photographs."""

    def build(*flags: str, stream: str = "instance", its_samples: list | None = None):
        run = start_run(script, tiny, tmp_path_factory.mktemp("run"), *flags)
        return training_set(script, run, its_samples or samples, stream)

    return build


def same(one: object, other: object) -> bool:
    """Whether two items, or two values in them, agree bit for bit."""
    if torch.is_tensor(one):
        return one.equal(other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_a_visit_has_everything_that_the_step_needs(open_set, samples):
    """Shapes, and values in range."""
    item = open_set()[2, 10]
    assert item["noise"].shape == (16, 32) and item["noise"].dtype == torch.float32
    assert item["pixels"].shape == (3, 64, 64) and item["pixels"].abs().max() <= 1
    assert item["u"].shape == () and 0 <= item["u"] <= 1
    assert (item["name"], item["caption"]) == ("02.jpg", "caption of 02.jpg")
    assert (item["target"], item["position"]) == (SQUARE, 10)


FLAGS = ("--random_flip", "--caption_dropout", "0.5", "--vae_encode_mode", "sample")


@pytest.fixture(scope="module")
def random_flags(reference_dropout) -> tuple[str, ...]:
    """Everything that a visit can draw."""
    return (*FLAGS, *reference_dropout)


def test_a_visit_is_the_same_in_every_instance(open_set, random_flags):
    """Whatever was drawn before, and whatever the global generator says."""
    first, second = open_set(*random_flags), open_set(*random_flags)
    for position in range(20):
        first[1, 100 + position]
    torch.manual_seed(1)
    one = [first[position % 5, position] for position in range(6)]
    torch.manual_seed(2)
    other = [second[position % 5, position] for position in reversed(range(6))][::-1]
    assert all(same(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_workers_change_nothing(script, open_set, random_flags):
    """Batches of 0 and of 2 worker processes are equal bit for bit, and in order."""
    collected = []
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(
            open_set(*random_flags),
            batch_sampler=make(script, targets=[SQUARE] * 5, batch=2),
            collate_fn=script.collate,
            num_workers=workers,
        )
        iterator = iter(loader)
        collected.append([next(iterator) for _ in range(5)])
        del iterator
    assert all(same(one, other) for one, other in zip(*collected, strict=True))
    assert [batch["position"] for batch in collected[0]] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


def test_a_set_can_be_sent_to_a_spawned_worker(script, open_set, random_flags):
    """Windows and macOS pickle it; the copy makes the same visits."""
    data = open_set(*random_flags)
    copy = pickle.loads(pickle.dumps(data))
    assert same(copy[3, 17], data[3, 17])
    pickle.loads(pickle.dumps((make(script), script.collate)))


def test_another_position_draws_everything_anew(open_set):
    """Two visits of one image share neither noise nor sigma nor crop."""
    data = open_set(*FLAGS, "--resolution", "32")
    one, other = data[3, 0], data[3, 1]
    for key in ("noise", "u", "pixels", "posterior_noise"):
        assert not one[key].equal(other[key]), key


def test_another_seed_and_another_stream_draw_everything_anew(open_set):
    """At the same position of the same image."""
    items = [open_set()[3, 0], open_set("--seed", "1")[3, 0], open_set(stream="class")[3, 0]]
    for one, other in itertools.combinations(items, 2):
        assert not one["noise"].equal(other["noise"]) and one["u"] != other["u"]


def test_two_purposes_at_one_position_are_not_correlated(open_set):
    """Noise and posterior noise come from generators of their own."""
    item = open_set(*FLAGS)[0, 0]
    assert item["noise"].numel() == item["posterior_noise"].numel()
    pair = torch.stack([item["noise"].flatten(), item["posterior_noise"].flatten()])
    assert torch.corrcoef(pair)[0, 1].abs() < 0.2


def test_the_noise_is_standard_normal(open_set):
    """Over 20 visits: 10,240 numbers."""
    data = open_set()
    noise = torch.cat([data[0, position]["noise"].flatten() for position in range(20)])
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05


def test_the_crop_is_redrawn_at_every_visit_and_center_crop_fixes_it(open_set):
    """03.jpg is 200 x 120: there is room to move."""
    free, fixed = open_set(), open_set("--center_crop")
    assert len({free[3, position]["pixels"].sum().item() for position in range(10)}) > 3
    assert len({fixed[3, position]["pixels"].sum().item() for position in range(10)}) == 1


def test_half_of_the_visits_are_mirrored_and_none_without_random_flip(open_set):
    """A flipped visit is the mirror image of the unflipped one."""
    plain, flipping = open_set("--center_crop"), open_set("--center_crop", "--random_flip")
    upright = plain[0, 0]["pixels"]
    flips = []
    for position in range(40):
        pixels = flipping[0, position]["pixels"]
        flips.append(pixels.equal(upright.flip(-1)))
        assert flips[-1] or pixels.equal(upright)
    assert 10 <= sum(flips) <= 30
    assert all(plain[0, position]["pixels"].equal(upright) for position in range(10))


def test_caption_dropout_replaces_the_caption_by_the_empty_prompt(open_set):
    """With the given probability, drawn at every visit; the noise is not moved by it."""
    data, whole = open_set("--caption_dropout", "0.3"), open_set()
    captions = Counter(data[0, position]["caption"] for position in range(100))
    assert set(captions) == {"", "caption of 00.jpg"} and 15 <= captions[""] <= 45
    assert data[0, 0]["noise"].equal(whole[0, 0]["noise"]) and data[0, 0]["u"] == whole[0, 0]["u"]
    assert {open_set("--caption_dropout", "1")[0, position]["caption"] for position in range(5)} == {""}


def test_a_visit_of_a_bucket_has_the_size_of_the_bucket(open_set, samples):
    """Height first: 2 x 6 tokens of 16 x 16 pixels."""
    item = open_set(its_samples=[replace(samples[0], image=replace(samples[0].image, target=(32, 96)))])[0, 0]
    assert item["pixels"].shape == (3, 32, 96) and item["noise"].shape == (12, 32)


def test_a_cached_visit_reads_the_latents_of_its_flip(script, open_set, samples):
    """Of the image and its references alike. No image is opened: the source does not even exist."""
    data = open_set("--cache_latents", "--random_flip")
    gone = replace(samples[0], image=replace(samples[0].image, path=Path("gone.jpg")))
    data.samples = [gone]
    for number, which in enumerate((False, True)):
        for image in getattr(gone, "images", [gone.image]):
            data.codec.cache.put(torch.full((2, 8, 8, 8), float(number)), "image", *data.codec.key(image, which))
    seen = set()
    for item in (data[0, position] for position in range(30)):
        assert "pixels" not in item
        (value,) = torch.stack([item["moments"], *item.get("references", ())]).unique().tolist()
        seen.add(value)
    assert seen == {0.0, 1.0}


def test_collate_stacks_tensors_and_lists_the_rest(script):
    """And does not mind where it is called: workers import it by name."""
    batch = script.collate([{"noise": torch.ones(2, 3), "name": "a"}, {"noise": torch.zeros(2, 3), "name": "b"}])
    assert batch["noise"].shape == (2, 2, 3) and batch["name"] == ["a", "b"]
    assert script.collate.__qualname__ == "collate"
