"""Replicas of the server under Ray Serve, one of which is killed under load; and the policy of their number."""

import socket
import threading
import time
import types

import httpx
import pytest
from serving import picture

pytest.importorskip("ray", reason="the extra ray is not installed")

import ray
from ray import serve

from uniref_fast.serve.ray import Edits, TokenPolicy, application

LIMIT = 240


def context(*tokens, least=1, most=4):
    metrics = {"tokens": dict(enumerate(tokens))} if tokens else {}
    return types.SimpleNamespace(
        aggregated_metrics=metrics, capacity_adjusted_min_replicas=least, capacity_adjusted_max_replicas=most
    )


@pytest.mark.parametrize(
    ("tokens", "replicas"), [((), 1), ((0, 0), 1), ((100,), 1), ((101,), 2), ((100, 150), 3), ((900, 900), 4)]
)
def test_replicas_follow_the_tokens(tokens, replicas):
    assert TokenPolicy(100)(context(*tokens)) == (replicas, {})


def test_a_replica_reports_its_tokens_and_a_failed_engine(stub):
    replica = Edits(lambda: types.SimpleNamespace(engine=stub))
    stub.submit(None)
    stub.submit(None)
    assert replica.record_autoscaling_stats() == {"tokens": 150.0}
    replica.check_health()
    stub.failed = True
    with pytest.raises(RuntimeError, match="has failed"):
        replica.check_health()


def test_numbers_of_replicas():
    scaled = application(lambda: None, min_replicas=1, max_replicas=4, tokens_per_replica=100)._bound_deployment
    policy = scaled._deployment_config.autoscaling_config.policy
    assert policy.get_policy()(**policy.policy_kwargs)(context(250)) == (3, {})
    assert application(lambda: None, min_replicas=2, max_replicas=2)._bound_deployment.num_replicas == 2
    with pytest.raises(ValueError, match="min = 3 and max = 2"):
        application(lambda: None, min_replicas=3, max_replicas=2)


@pytest.fixture
def cluster():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(
        num_cpus=2, num_gpus=0, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False,
        configure_logging=False, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
    )  # fmt: skip
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def replicas():
    return [each["name"] for each in ray.util.list_named_actors(True) if each["name"].startswith("SERVE_REPLICA")]


@pytest.mark.slow
def test_every_request_is_answered_when_a_replica_is_killed(cluster):
    """A client gets its image, at first or when it repeats a request that was answered with an error."""

    def build():
        import torch

        from uniref_fast import Engine
        from uniref_fast.builtin import load
        from uniref_fast.serve.config import ServeConfig
        from uniref_fast.serve.service import EditService

        torch.set_num_threads(1)
        return EditService(Engine(load(torch.bfloat16), max_waiting=32), ServeConfig("builtin", guidance=1.0))

    serve.run(application(build, num_gpus=0, num_cpus=0.5, min_replicas=2, max_replicas=2), name="edits")
    assert httpx.get(f"{cluster}/ready").status_code == 200 and len(replicas()) == 2
    answers = {}

    def client(number):
        fields = {"prompt": "make it night", "steps": "100", "seed": str(number % 3)}
        answers[number] = []
        end = time.monotonic() + LIMIT
        while time.monotonic() < end:
            answer = httpx.post(
                f"{cluster}/v1/images/edits", data=fields, files={"image": picture()}, timeout=LIMIT
            )  # a broken connection would raise an error
            answers[number].append(answer)
            if answer.status_code == 200:
                return
            time.sleep(0.2)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(1)  # all replicas have requests, and none is finished
    killed = replicas()[0]
    ray.kill(ray.get_actor(killed, namespace="serve"))
    for thread in threads:
        thread.join(LIMIT)
    statuses = [[answer.status_code for answer in each] for each in answers.values()]
    assert len(statuses) == 8 and all(each[-1] == 200 for each in statuses), statuses
    assert {status for each in statuses for status in each[:-1]} <= {500, 503}, statuses
    assert any(len(each) > 1 for each in statuses), "the killed replica had requests"
    images = {(number % 3, each[-1].json()["data"][0]["b64_json"]) for number, each in answers.items()}
    assert len(images) == 3, "all replicas give the same image for a seed"
