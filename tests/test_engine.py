"""Engine: edits that arrive over time, each equal to `edit` alone."""

import asyncio
import dataclasses
import functools
import random
import threading
import types
import weakref
from concurrent.futures import CancelledError, wait

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

import uniref_fast
import uniref_fast.engine
from uniref_fast import EditRequest, Engine
from uniref_fast.builtin import load
from uniref_fast.edit_loop import EditLoop
from uniref_fast.edit_session import EditSession
from uniref_fast.engine import EngineClosedError, QueueFullError, tokens_in_memory
from uniref_fast.engine_queue import MAX_OVERTAKEN, Queue

pytestmark = pytest.mark.usefixtures("threads")

LIMIT = 60  # seconds that a test waits before it fails


@pytest.fixture(scope="module")
def pipe():
    return load(torch.bfloat16)


def picture(color, width=60, height=40):
    image = Image.new("RGB", (width, height), color)
    image.paste("white", (width // 4, height // 4, width // 2, height // 2))
    return image


def drawn(seed, **fields):
    """Return a request with a random size, number of references and of steps, with guidance or without."""
    rng = random.Random(seed)
    images = [picture(color, rng.randint(30, 90), rng.randint(30, 90)) for color in ("red", "green", "blue")]
    given = dict(
        images=images[: rng.randint(0, 3)],
        seed=seed,
        height=rng.choice([32, 48, 64]),
        width=rng.choice([32, 48, 64]),
        num_inference_steps=rng.randint(2, 5),
        negative_prompt=rng.choice([None, " "]),
    )
    given |= fields
    given.setdefault("true_cfg_scale", 2.0 if given["negative_prompt"] else 1.0)
    return EditRequest("make it " + " ".join(["night"] * rng.randint(1, 5)), **given)


def alone(pipe, request, **options):
    return uniref_fast.edit(pipe, [request], progress=False, output_type="latent", **options)[0]


class Gate:
    """An `on_progress` that holds the worker after a step until it is opened."""

    def __init__(self):
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, progress):
        self.reached.set()
        assert self.opened.wait(LIMIT)


def held(engine, **fields):
    """Submit a request and return its future and its gate, with the worker held after its first step."""
    gate = Gate()
    future = engine.submit(drawn(99, **({"num_inference_steps": 3} | fields)), gate, output_type="latent")
    assert gate.reached.wait(LIMIT)
    return future, gate


@pytest.mark.parametrize(
    "options",
    [{}, {"max_tokens": 150}, {"keep_references": "auto"}, {"mode": "fast", "impl": "reference"}],
    ids=["default", "small packs", "kept references", "8 bits"],
)
def test_arrivals_at_any_time_give_the_bits_of_edit_alone(pipe, options):
    """Requests of several threads join and leave a running loop; some are cancelled."""
    requests = [drawn(seed) for seed in range(7)]
    futures = {}
    with Engine(pipe, **options) as engine:

        def client(numbers):
            rng = random.Random(numbers[0])
            for number in numbers:
                first = threading.Event()
                futures[number] = engine.submit(requests[number], lambda _, e=first: e.set(), output_type="latent")
                if rng.random() < 0.5:
                    first.wait(LIMIT)
                if number == 4:
                    futures[number].cancel()

        threads = [threading.Thread(target=client, args=(range(i, 7, 3),)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
    own = {name: value for name, value in options.items() if name != "max_tokens"}
    for number, future in futures.items():
        if not future.cancelled():
            assert torch.equal(future.result(0), alone(pipe, requests[number], **own)), number
    stats = engine.stats()
    assert stats.finished + stats.cancelled == 7 and stats.waiting == stats.running == stats.failed == 0
    assert sum(future.cancelled() for future in futures.values()) == stats.cancelled <= 1


def test_edits_join_a_running_loop_and_leave_it(pipe, monkeypatch):
    sizes, step = [], EditLoop.step

    def counted(loop):
        sizes.append(len(loop.edits))
        return step(loop)

    monkeypatch.setattr(EditLoop, "step", counted)
    with Engine(pipe) as engine:
        first, gate = held(engine)
        second = engine.submit(drawn(1, num_inference_steps=2))
        gate.opened.set()
        assert second.result(LIMIT).size and first.result(LIMIT) is not None
    assert sizes == [1, 2, 2]


def test_progress_and_stats_count_tokens_and_seconds(pipe):
    seen, request = [], drawn(5, negative_prompt=" ", num_inference_steps=2, images=[picture("red")])
    with Engine(pipe) as engine:
        _, gate = held(engine)
        later = engine.submit(request, seen.append)
        gate.opened.set()
        later.result(LIMIT)
    sizes, stats = engine.check(request), engine.stats()
    assert [each.steps for each in seen] == [1, 2] and all(each.waited > 0 for each in seen)
    for each in seen:
        assert (each.sample.target, each.sample.references) == (
            sizes.grid(sizes.size),
            (sizes.grid(sizes.reference_sizes[0]),),
        )
        assert each.sample.length < each.tokens < 2 * each.sample.length  # the negative prompt is shorter
    assert stats.step_seconds > 0 and not stats.has_failed
    with pytest.raises(ValueError, match="has no prompt"):
        engine.check({"prompt": " "})


def test_results_of_each_output_type(pipe):
    request = drawn(3, num_inference_steps=2)
    with Engine(pipe) as engine:
        for kind in ("pil", "np", "pt"):
            result = engine.submit(request, output_type=kind).result(LIMIT)
            (expected,) = uniref_fast.edit(pipe, [request], progress=False, output_type=kind)
            assert type(result) is type(expected)
            assert torch.equal(result, expected) if kind == "pt" else np.array_equal(result, expected)


# ---- the queue ----


def test_first_come_first_served_with_bounded_overtaking(pipe):
    """A request that does not fit is overtaken by small ones for a while only, and then runs alone."""
    small = {"height": 32, "width": 32, "images": [], "negative_prompt": None, "num_inference_steps": 2}
    order = []
    with Engine(pipe, max_tokens=140) as engine:
        running, gate = held(engine, **(small | {"num_inference_steps": 30}))
        large = engine.submit(drawn(1, height=96, width=96, images=[], negative_prompt=None), output_type="latent")
        assert engine.stats().tokens < 140
        large.add_done_callback(lambda _: order.append("large"))
        futures = [engine.submit(drawn(i, **small), output_type="latent") for i in range(3 * MAX_OVERTAKEN)]
        for future in futures:
            future.add_done_callback(lambda _: order.append("small"))
        gate.opened.set()
        wait([large, *futures, running], LIMIT)
    assert order.index("large") == MAX_OVERTAKEN, order
    assert torch.equal(large.result(0), alone(pipe, drawn(1, height=96, width=96, images=[], negative_prompt=None)))


def test_priorities(pipe):
    """A higher priority starts first; one priority keeps its order."""
    started = []
    with Engine(pipe, max_tokens=1) as engine:  # each request runs alone
        _, gate = held(engine)
        for name, priority in (("a", 0), ("b", 1), ("c", 1), ("d", 0)):
            engine.submit(drawn(1, num_inference_steps=2), lambda _, name=name: started.append(name), priority=priority)
        gate.opened.set()
    assert started == [name for name in "bcad" for _ in range(2)]


def test_a_full_queue(pipe):
    with Engine(pipe, max_tokens=1, max_waiting=2) as engine:
        _, gate = held(engine)
        waiting = [engine.submit(drawn(i, num_inference_steps=2)) for i in range(2)]
        with pytest.raises(QueueFullError, match="2 requests are waiting"):
            engine.submit(drawn(5))
        waiting[0].cancel()  # makes room
        assert engine.stats().waiting == 1
        engine.submit(drawn(6, num_inference_steps=2))
        gate.opened.set()
    assert engine.stats().finished == 3 and engine.stats().cancelled == 1


# ---- ends ----


def test_cancelling(pipe):
    with Engine(pipe, max_tokens=1) as engine:
        running, gate = held(engine)
        waiting = engine.submit(drawn(2))
        assert waiting.cancel() and running.cancel()
        gate.opened.set()
        with pytest.raises(CancelledError):
            running.result(LIMIT)
        assert engine.submit(drawn(3, num_inference_steps=2)).result(LIMIT)
    assert engine.stats().cancelled == 2 and engine.stats().steps == 1 + 2


def test_asyncio(pipe):
    request = drawn(4, num_inference_steps=2)

    async def run(engine):
        task = asyncio.ensure_future(asyncio.wrap_future(engine.submit(request, output_type="latent")))
        _, gate = await asyncio.to_thread(held, engine)
        cancelled = asyncio.ensure_future(asyncio.wrap_future(engine.submit(drawn(5))))
        await asyncio.sleep(0)
        cancelled.cancel()
        gate.opened.set()
        return await task

    with Engine(pipe) as engine:
        assert torch.equal(asyncio.run(run(engine)), alone(pipe, request))
    assert engine.stats().cancelled == 1


def test_closing(pipe):
    engine = Engine(pipe)
    future = engine.submit(drawn(1, num_inference_steps=2))
    engine.close()
    engine.close()
    assert future.result(0)
    with pytest.raises(EngineClosedError, match="closed"):
        engine.submit(drawn(1))
    engine = Engine(pipe, max_tokens=1)
    running, gate = held(engine)
    waiting = engine.submit(drawn(2))
    threading.Timer(0.1, gate.opened.set).start()
    engine.close(drain=False)
    assert running.cancelled() and waiting.cancelled() and not engine._thread.is_alive()


def test_an_error_in_the_block_cancels_what_is_left(pipe):
    with pytest.raises(KeyError), Engine(pipe) as engine:
        future, gate = held(engine)
        threading.Timer(0.1, gate.opened.set).start()
        raise KeyError
    assert future.cancelled()


def test_callbacks_may_call_the_engine(pipe):
    """Closing calls the callbacks of cancelled futures, which may use the engine, also in another thread."""
    engine = Engine(pipe, max_tokens=1)
    running, gate = held(engine)
    waiting, seen = engine.submit(drawn(2)), []

    def callback(_):
        other = threading.Thread(target=lambda: seen.append(engine.stats().waiting))
        other.start()
        other.join(LIMIT)
        gate.opened.set()
        engine.close()

    waiting.add_done_callback(callback)
    closing = threading.Thread(target=engine.close, kwargs={"drain": False}, daemon=True)
    closing.start()
    closing.join(LIMIT)
    assert not closing.is_alive() and seen == [0] and running.done() and waiting.cancelled()


def test_closing_while_a_request_is_encoded(pipe, monkeypatch):
    """The request is cancelled like the others, and those that were cancelled meanwhile are not encoded."""
    encode, encoded = EditSession.encode, []
    inside, go = threading.Event(), threading.Event()

    def slow(session, checked):
        encoded.append(checked.request.seed)
        inside.set()
        assert go.wait(LIMIT)
        return encode(session, checked)

    monkeypatch.setattr(EditSession, "encode", slow)
    engine = Engine(pipe)
    futures = [engine.submit(drawn(seed, num_inference_steps=9)) for seed in range(3)]
    assert inside.wait(LIMIT)
    threading.Timer(0.1, go.set).start()
    engine.close(drain=False)
    assert all(future.cancelled() for future in futures) and encoded == [0] and engine.stats().steps == 0


@pytest.mark.parametrize(
    "request_, error, message",
    [
        ({"prompt": ""}, ValueError, "no prompt"),
        ({"prompt": "x", "steps": 3}, ValueError, "unknown fields"),
        ({"prompt": "x", "images": ["cup.png"]}, TypeError, "PIL image"),
        ({"prompt": "x", "latents": torch.zeros(1, 3, 3)}, ValueError, "latents have shape"),
        (7, TypeError, "EditRequest"),
    ],
)
def test_wrong_requests_are_refused_when_they_are_submitted(pipe, request_, error, message):
    with Engine(pipe) as engine, pytest.raises(error, match=message):
        engine.submit(request_)


@pytest.mark.parametrize("options, message", [({"priority": None}, "priority"), ({"on_progress": 5}, "on_progress")])
def test_wrong_arguments_of_submit(pipe, options, message):
    with Engine(pipe) as engine, pytest.raises(TypeError, match=message):
        engine.submit(drawn(1), **options)


def test_wrong_options(pipe):
    for options, message in (
        ({"max_tokens": 0}, "max_tokens must be a whole number from 1"),
        ({"max_waiting": 1.5}, "max_waiting must be"),
        ({"keep_dtype": "int4"}, "keep_dtype"),
        ({"mode": "fast"}, "e4m3"),
        ({"budget": 3}, "budget"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine(pipe, **options)
    with Engine(pipe) as engine, pytest.raises(ValueError, match="output_type"):
        engine.submit(drawn(1), output_type="gif")


# ---- failures ----


def test_a_request_that_cannot_be_encoded_fails_alone(pipe, monkeypatch):
    encode = EditSession.encode

    def failing(session, checked):
        if checked.request.seed == 2:
            raise RuntimeError("damaged picture")
        return encode(session, checked)

    monkeypatch.setattr(EditSession, "encode", failing)
    with Engine(pipe) as engine:
        _, gate = held(engine)
        futures = [engine.submit(drawn(seed, num_inference_steps=2)) for seed in (1, 2, 3)]
        gate.opened.set()
        with pytest.raises(RuntimeError, match="damaged picture"):
            futures[1].result(LIMIT)
        assert futures[0].result(LIMIT) and futures[2].result(LIMIT)
    assert engine.stats().failed == 1 and engine.stats().finished == 3


@pytest.mark.parametrize("keep", [False, "auto"])
def test_a_step_that_fails_ends_one_edit_and_no_other(pipe, monkeypatch, keep):
    """The others get the same bits, also where a step that failed had changed their kept references."""
    requests = [drawn(seed, num_inference_steps=4) for seed in (1, 2, 3)]
    predict = EditLoop._predict

    def failing(loop, packs):
        velocities = predict(loop, packs)
        if any(edit.request.seed == 2 and edit.steps == 2 for edit in loop.edits):
            raise RuntimeError("device-side fault")
        return velocities

    monkeypatch.setattr(EditLoop, "_predict", failing)
    with Engine(pipe, keep_references=keep) as engine:
        _, gate = held(engine)
        futures = [engine.submit(request, output_type="latent") for request in requests]
        gate.opened.set()
        with pytest.raises(RuntimeError, match="device-side fault"):
            futures[1].result(LIMIT)
        results = [futures[i].result(LIMIT) for i in (0, 2)]
    monkeypatch.undo()
    for result, request in zip(results, (requests[0], requests[2]), strict=True):
        assert torch.equal(result, alone(pipe, request, keep_references=keep))


@pytest.mark.parametrize("keep", [False, 2])
def test_a_last_step_that_fails_once(pipe, monkeypatch, keep):
    """An edit with kept references starts again, and no edit is lost."""
    request = drawn(1, images=[picture("red")], num_inference_steps=3)
    expected = alone(pipe, request, keep_references=keep)
    predict, failed = EditLoop._predict, []

    def failing(loop, packs):
        if loop.edits[0].steps == 2 and not failed:
            failed.append(True)
            raise RuntimeError("once")
        return predict(loop, packs)

    monkeypatch.setattr(EditLoop, "_predict", failing)
    with Engine(pipe, keep_references=keep) as engine:
        result = engine.submit(request, output_type="latent").result(LIMIT)
    assert failed and torch.equal(result, expected) and not engine._loop.edits


def test_a_step_that_fails_for_the_pack_only(pipe, monkeypatch, caplog):
    """Each edit runs alone from then on, and the results have the same bits."""
    requests = [drawn(seed, num_inference_steps=3) for seed in (1, 2)]
    predict = EditLoop._predict

    def failing(loop, packs):
        if any(len(pack.sequences) > 1 for pack in packs):
            raise RuntimeError("unlucky shape")
        return predict(loop, packs)

    monkeypatch.setattr(EditLoop, "_predict", failing)
    with Engine(pipe, keep_references=2) as engine:
        futures = [engine.submit(request, output_type="latent") for request in requests]
        results = [future.result(LIMIT) for future in futures]
    assert "each runs alone from now on" in caplog.text
    monkeypatch.undo()
    for result, request in zip(results, requests, strict=True):
        assert torch.equal(result, alone(pipe, request, keep_references=2))


def test_many_bad_requests_do_no_harm(pipe, monkeypatch):
    """Each of them fails alone, however many there are before a good edit finishes."""
    predict = EditLoop._predict

    def failing(loop, packs):
        if any(edit.request.seed == 2 for edit in loop.edits):
            raise RuntimeError("bad request")
        return predict(loop, packs)

    monkeypatch.setattr(EditLoop, "_predict", failing)
    monkeypatch.setattr(uniref_fast.engine, "MAX_FAILURES", 2)
    small = {"height": 32, "width": 32, "images": [], "negative_prompt": None}
    bad = drawn(2, **small)
    with Engine(pipe) as engine:
        futures = []
        good = engine.submit(
            drawn(1, **small, num_inference_steps=8), lambda _: futures.append(engine.submit(bad)), output_type="latent"
        )
        assert good.result(LIMIT) is not None
    assert len(futures) == 8 and all(isinstance(future.exception(0), RuntimeError) for future in futures)


@pytest.mark.parametrize("stochastic", [False, True])
def test_a_scheduler_that_fails_in_its_step(pipe, monkeypatch, stochastic):
    """The scheduler has changed its state before, so the edit starts again; the result has the same bits."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, stochastic_sampling=stochastic)
    monkeypatch.setattr(pipe, "scheduler", scheduler)
    step, failed, seen = FlowMatchEulerDiscreteScheduler.step, [], []
    request = drawn(1, num_inference_steps=4)
    expected = alone(pipe, request)

    @functools.wraps(step)
    def failing(self, *args, **options):
        result = step(self, *args, **options)
        if len(seen) == 2 and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("out of memory")
        return result

    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "step", failing)
    with Engine(pipe) as engine:
        result = engine.submit(request, lambda p: seen.append(p.steps), output_type="latent").result(LIMIT)
    assert failed and seen == [1, 2, 1, 2, 3, 4] and engine._loop.pack_tokens != 1 and torch.equal(result, expected)


def test_steps_that_fail_again_and_again_end(pipe, monkeypatch):
    """A fault that no edit shows alone cannot keep the engine busy forever."""
    predict = EditLoop._predict

    def failing(loop, packs):
        if loop is engine._loop:
            raise RuntimeError("fault")
        return predict(loop, packs)

    monkeypatch.setattr(EditLoop, "_predict", failing)
    with Engine(pipe, keep_references=2) as engine:
        future = engine.submit(drawn(1, images=[picture("red")], num_inference_steps=3))
        with pytest.raises(RuntimeError, match="fault"):
            future.result(LIMIT)


def test_out_of_memory_halves_the_packs(pipe, monkeypatch, caplog):
    """The step that failed runs again in smaller packs, and a sequence that is too large alone fails alone."""
    model_type = type(EditSession(pipe).model)
    forward, packs = model_type.forward, []

    def limited(model, image, text, t, layout, *more, **options):
        packs.append(layout.joint_length)
        if layout.joint_length > 120:
            raise torch.OutOfMemoryError("out of memory")
        return forward(model, image, text, t, layout, *more, **options)

    small = {"height": 48, "width": 48, "images": [], "num_inference_steps": 2}
    requests = [drawn(seed, **small) for seed in range(6)]
    monkeypatch.setattr(model_type, "forward", limited)
    with Engine(pipe, keep_references=2) as engine:
        _, gate = held(engine, **small)
        futures = [engine.submit(request, output_type="latent") for request in requests]
        too_large = engine.submit(drawn(7, height=128, width=128))
        gate.opened.set()
        with pytest.raises(torch.OutOfMemoryError):
            too_large.result(LIMIT)
        results = [future.result(LIMIT) for future in futures]
        later = len(packs)
        engine.submit(requests[0]).result(LIMIT)
        assert max(packs[later:]) <= 120 and engine.max_tokens <= 120
    assert "out of memory with a pack of" in caplog.text
    monkeypatch.undo()
    for result, request in zip(results, requests, strict=True):
        assert torch.equal(result, alone(pipe, request, keep_references=2))


def test_encoding_without_memory_waits_until_an_edit_has_left(pipe, monkeypatch):
    """The generator of a request draws the same noise as if it had been encoded once."""
    encode, tries = EditSession.encode, []
    request = dataclasses.replace(drawn(1, num_inference_steps=2), seed=None)
    expected = alone(pipe, dataclasses.replace(request, generator=torch.Generator().manual_seed(5)))

    def limited(session, checked):
        tries.append(checked.request.seed)
        result = encode(session, checked)
        if len(engine._loop.edits) > 0:
            raise torch.OutOfMemoryError("out of memory")
        return result

    monkeypatch.setattr(EditSession, "encode", limited)
    with Engine(pipe) as engine:
        first, gate = held(engine)
        generator = torch.Generator().manual_seed(5)
        second = engine.submit(dataclasses.replace(request, generator=generator), output_type="latent")
        gate.opened.set()
        assert torch.equal(second.result(LIMIT), expected) and first.done()
    assert tries == [99, None, None]


def test_a_callback_that_raises_anything_ends_nothing(pipe, caplog):
    """Futures pass exceptions of callbacks over, but not SystemExit."""

    def exits(_):
        raise SystemExit

    with Engine(pipe) as engine:
        _, gate = held(engine)
        first, second = (engine.submit(drawn(seed, num_inference_steps=2)) for seed in (1, 2))
        first.add_done_callback(exits)
        gate.opened.set()
        assert first.result(LIMIT) and second.result(LIMIT)
    assert "a callback of a future has failed" in caplog.text


def test_guidance_that_has_no_effect_is_a_warning(pipe):
    with Engine(pipe) as engine, pytest.warns(UserWarning, match="has no effect without a negative prompt"):
        engine.submit(drawn(1, negative_prompt=None, true_cfg_scale=2.0)).result(LIMIT)


def test_a_request_that_was_put_back_keeps_its_place():
    queue = Queue()
    jobs = [types.SimpleNamespace(priority=priority, order=0, overtaken=0, tokens=1) for priority in (0, 0, 5)]
    queue.add(jobs[0])
    queue.add(jobs[1])
    taken = queue.take(1)
    queue.add(jobs[2])
    queue.put_back(taken)
    assert taken is jobs[0] and queue.jobs == [jobs[2], jobs[0], jobs[1]]


def test_decoding_without_memory_is_tried_again(pipe, monkeypatch):
    decode, tries = EditSession.decode, []

    def limited(session, edit, output_type):
        tries.append(output_type)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return decode(session, edit, output_type)

    monkeypatch.setattr(EditSession, "decode", limited)
    with Engine(pipe) as engine:
        assert engine.submit(drawn(1, num_inference_steps=2)).result(LIMIT).size and len(tries) == 2


def test_what_a_failed_step_held_is_freed(pipe, monkeypatch):
    predict, held_tensors = EditLoop._predict, []

    def failing(loop, packs):
        if len(held_tensors) < 1:
            activation = torch.zeros(7)
            held_tensors.append(weakref.ref(activation))
            raise RuntimeError("fault")
        assert held_tensors[0]() is None, "alive while the edits run alone"
        return predict(loop, packs)

    monkeypatch.setattr(EditLoop, "_predict", failing)
    with Engine(pipe) as engine:
        assert engine.submit(drawn(1, num_inference_steps=2)).result(LIMIT)


def test_a_fault_of_the_engine_reaches_every_future(pipe, monkeypatch):
    def broken(engine):
        raise MemoryError("fault")

    engine = Engine(pipe)
    first, gate = held(engine)
    second = engine.submit(drawn(1))
    monkeypatch.setattr(Engine, "_step", broken)
    gate.opened.set()
    for future in (first, second):
        with pytest.raises(MemoryError):
            future.result(LIMIT)
    with pytest.raises(EngineClosedError, match="has failed: fault"):
        engine.submit(drawn(1))
    engine.close()


# ---- progress ----


def test_progress_and_previews(pipe):
    seen, images = [], []

    def on_progress(progress):
        seen.append((progress.steps, progress.num_inference_steps))
        images.append(progress.preview())

    with Engine(pipe) as engine:
        result = engine.submit(drawn(1, num_inference_steps=4), on_progress).result(LIMIT)
    assert seen == [(i, 4) for i in (1, 2, 3, 4)]
    assert np.array_equal(images[-1], result) and not np.array_equal(images[0], result)


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit])
def test_an_error_in_on_progress_ends_its_edit_only(pipe, error):
    def on_progress(progress):
        raise error

    with Engine(pipe) as engine:
        _, gate = held(engine)
        futures = [engine.submit(drawn(1, num_inference_steps=2), each) for each in (on_progress, None)]
        gate.opened.set()
        with pytest.raises(error):
            futures[0].result(LIMIT)
        assert futures[1].result(LIMIT)


# ---- memory ----


def test_tokens_that_fit_the_memory(pipe):
    """Twice the memory holds twice the tokens, and kept references leave room for fewer."""
    model = EditSession(pipe).model
    some = tokens_in_memory(model, 1 << 30)
    assert abs(tokens_in_memory(model, 1 << 31) - 2 * some) <= 1
    assert tokens_in_memory(model, 1 << 30, kept=True) < some and tokens_in_memory(model, 0) == 1
