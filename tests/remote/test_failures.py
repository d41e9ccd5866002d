"""What goes wrong with a server, made to go wrong on a real one: our error, in time, and the next call works."""

import logging
import subprocess
import sys
import time
import traceback

import pytest

import sae_lab as sl
from sae_lab.lm.loading import know_id
from sae_lab.lm.remote import Job, NDIFError, NDIFTimeout
from tests.remote.conftest import PROMPTS, TINY, same
from tests.remote.server import LIMIT

pytestmark = pytest.mark.remote
KEY = "6f9619ff-8b86-d011-b42d-00c04fc964ff"
BASE, SOURCE = "The fox ran over the hill", "The dog sat on the mill"


def sleeper(seconds):
    """A metric that takes its time."""

    def metric(logits, tokens):
        time.sleep(seconds)
        return logits[:, -1, 0]

    return metric


def slowly(lm, seconds):
    return lm.run(lm.tokenize(BASE), logits=sleeper(seconds))[1]


def works(far, near):
    same(far.logits(BASE), near.logits(BASE))


def test_a_job_of_30_seconds_under_a_deadline_of_5(server, far, near):
    works(far, near)
    hasty = sl.LM(TINY, remote=server.url, deadline=5)
    began = time.monotonic()
    with pytest.raises(NDIFTimeout, match=r"not done after 5 s \(its status: RUNNING\).*deadline="):
        slowly(hasty, 30)
    assert time.monotonic() - began < 8
    works(far, near)  # as soon as the server has given up on it


def test_a_job_longer_than_the_server_allows(far, near):
    with pytest.raises(NDIFError, match="took longer than the server allows: fewer or shorter prompts"):
        slowly(far, LIMIT + 20)
    works(far, near)


def test_the_api_dies_in_mid_job_and_comes_back(server, far, near):
    """While it is away, a call says so; a job that runs lives in the cluster, and is got as soon as one can ask. (One
    that only waits in the queue is lost with NDIF's dispatcher, which is killed here too, and meets its deadline.)"""
    works(far, near)
    hasty = sl.LM(TINY, remote=server.url, deadline=4)
    job = Job("slow", lambda: slowly(far, 5), far.server)
    while job.status != "RUNNING":
        assert job.seconds < 30
        time.sleep(0.05)
    server.stop("api", kill=True)
    try:
        began = time.monotonic()
        with pytest.raises(NDIFError, match="no server answers there: look at the address"):
            hasty.logits(BASE)
        assert time.monotonic() - began < 8 and not job.done
    finally:
        server.start("api")
    same(job.result(60), near.logits(BASE)[:, -1, 0])
    works(far, near)


def test_the_model_stops_in_mid_job(server, far, near):
    """The process that holds the model is killed: NDIF says so or runs the job again, and loads the model anew."""
    works(far, near)
    job = far.submit("logits", BASE, edits=[])
    for process in server.actors():
        process.kill()
    try:
        same(job.result(90), near.logits(BASE))
    except NDIFError as err:
        assert far.server.host in str(err)
    end = time.monotonic() + 90
    while True:  # until it is there again each call ends in our error
        try:
            works(far, near)
            break
        except NDIFError:
            assert time.monotonic() < end
            time.sleep(1)


def test_a_model_that_is_nowhere(server):
    with pytest.raises(ValueError, match="no config of 'sae-lab/nothing': it is not on the hub"):
        sl.LM("sae-lab/nothing", remote=server.url)
    lm = sl.LM(TINY, remote=server.url, deadline=60)
    lm._nn.repo_id = "sae-lab/nothing"  # known here, and not there
    know_id("sae-lab/nothing")
    with pytest.raises(NDIFError, match="the server cannot run this model"):
        lm.logits(BASE)


@pytest.fixture
def door(server):
    """Another API of the same cluster, with settings of its own."""
    opened = []

    def open_one(name, **settings):
        server.start(name, **settings)
        opened.append(name)
        return f"http://127.0.0.1:{server.port[name]}"

    yield open_one
    for name in opened:
        server.stop(name)


def test_keys(door, caplog):
    """No key, one that is no key, and a server that cannot check: each its own error, none of which holds the key."""
    url, told = door("api-keys", NDIF_POSTGRES_URL="postgresql://nobody@127.0.0.1:9/none"), []
    caplog.set_level(logging.DEBUG)
    for key, message in (
        (None, "the server wants an API key: pass LM"),
        ("my secret", "the server does not accept the API key"),
        (KEY, "cannot check keys at the moment"),
    ):
        lm = sl.LM(TINY, remote=url, api_key=key, deadline=20)
        with pytest.raises(NDIFError, match=message) as caught:
            lm.logits(BASE)
        told.append("".join(traceback.format_exception(caught.value)) + repr(lm) + repr(lm.server))
    for secret in ("my secret", KEY):
        assert secret not in "".join(told) + caplog.text


def test_no_key_gets_into_what_is_kept(server, coders, small_text, tmp_path):
    """Stores, coders, edits and jobs know nothing of it."""
    lm = sl.LM(TINY, remote=server.url, api_key=KEY, deadline=60)
    store = sl.harvest(lm, "layers.1", small_text, 100, path=tmp_path / "store", context=32)
    coders["topk"].save(tmp_path / "coder")
    job = lm.submit("loss", BASE)
    job.result(60)
    (tmp_path / "words").write_text(repr([lm, store, job, lm.server]) + sl.Steer(coders["topk"], 1).to_json())
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert len(files) > 3 and not any(KEY.encode() in f.read_bytes() for f in files)


def test_a_client_that_is_too_old(door):
    lm = sl.LM(TINY, remote=door("api-new", NDIF_MIN_NNSIGHT_VERSION="99.0"), deadline=20)
    with pytest.raises(NDIFError, match="this nnsight is too old for the server: pip install --upgrade nnsight"):
        lm.logits(BASE)


def test_an_error_in_the_block_is_told(far, near):
    def wrong(logits, tokens):
        return logits.no_such_method()

    with pytest.raises(NDIFError, match="the job failed there: AttributeError: 'Tensor' object has no attribute"):
        far.run(far.tokenize(BASE), logits=wrong)
    works(far, near)


def test_what_does_not_travel(far):
    class Mine:
        def __reduce__(self):
            raise TypeError("not me")

    mine = Mine()
    with pytest.raises(NDIFError, match=r"cannot be sent.*not me.*uses torch and numbers only"):
        far.run(far.tokenize(BASE), logits=lambda logits, tokens: (mine, logits)[1])


def test_an_answer_that_is_a_pickle_of_a_class_is_not_loaded(far):
    """Results are tensors and plain data: a server cannot make this process run anything."""
    with pytest.raises(NDIFError, match=r"its result holds .*: only tensors, numbers and text are read"):
        far.run(far.tokenize(BASE), logits=lambda logits, tokens: slice(1, 2).indices)


# ---- jobs


def test_a_job(far, near):
    job = far.submit("read", PROMPTS, "layers.1")
    assert job.id and job.status != "SENDING" and "read" in repr(job)
    same(job.result(60)["layers.1"], near.read(PROMPTS, "layers.1")["layers.1"])
    assert job.done and job.status == "COMPLETED" and job.seconds > 0
    assert far.submit("generate", BASE, max_new_tokens=4).result(60) == near.generate(BASE, max_new_tokens=4)


def test_a_job_with_an_edit_that_reads_the_model_first(far, near, coders):
    """The source's codes are a request of their own; the job is the one that answers."""
    edits = [sl.Patch(coders["topk"], SOURCE)]
    job = far.submit("logits", BASE, edits=edits)
    same(job.result(60), near.logits(BASE, edits=edits))
    same(far.submit("logits", BASE, edits=edits, job=job.id).result(60), job.result())


def test_several_jobs_wait_for_none_of_the_others(far, near):
    jobs = [far.submit("logits", prompt) for prompt in PROMPTS]
    for job, prompt in zip(jobs, PROMPTS, strict=True):
        same(job.result(60), near.logits(prompt))
    assert len({job.id for job in jobs}) == len(jobs)


def test_a_job_is_taken_up_again_by_another_kernel(server, far, near):
    id = far.submit("generate", BASE, max_new_tokens=5).id
    code = f"""if True:
        import sae_lab as sl
        lm = sl.LM({TINY!r}, remote={server.url!r}, deadline=60)
        print("said:", lm.submit("generate", {BASE!r}, max_new_tokens=5, job={id!r}).result())"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert f"said: {near.generate(BASE, max_new_tokens=5)}" in ran.stdout, ran.stderr[-2000:]


def test_a_job_that_no_one_knows(far):
    with pytest.raises(NDIFError, match="knows no job nothing: its id may be misspelled"):
        far.submit("logits", BASE, job="nothing").result(30)


def test_waiting_can_end_before_the_job(far, near):
    slow = Job("slow", lambda: slowly(far, 3), far.server)
    with pytest.raises(NDIFTimeout, match=r"is (QUEUED|DISPATCHED|RUNNING|RECEIVED) after"):
        slow.result(0.2)
    slow.cancel()
    with pytest.raises(NDIFError, match="was cancelled"):
        slow.result(5)
    assert slow.status == "CANCELLED"
    works(far, near)
