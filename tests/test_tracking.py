"""Trackers against what they leave: event files and W&B's files are read byte by byte, MLflow's store by its client."""

import errno
import json
import logging
import os
import struct
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradientspace_ray.training import tracking
from gradientspace_ray.training.engine import TrainingError
from gradientspace_ray.training.tracking import check_trackers, trackers

SETTINGS = {"learning_rate": 5e-4, "workers": 2, "deepspeed": {"zero": {"stage": 1}}}
VARINT, DOUBLE, BYTES, FLOAT = 0, 1, 2, 5


def opened(names, folder, **options):
    options = {"run_name": "study", "finetune": "math", "key": "0123456789abcdef", "settings": SETTINGS} | options
    return trackers(names, folder=folder, **options)


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(crc):
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(data, place):
    value = shift = 0
    while True:
        byte = data[place]
        value, shift, place = value | (byte & 0x7F) << shift, shift + 7, place + 1
        if byte < 0x80:
            return value, place


def fields(data):
    """(number, value) of each field of a protobuf message."""
    place = 0
    while place < len(data):
        tag, place = varint(data, place)
        kind = tag & 7
        if kind == VARINT:
            value, place = varint(data, place)
        else:
            length, place = varint(data, place) if kind == BYTES else ({DOUBLE: 8, FLOAT: 4}[kind], place)
            value, place = data[place : place + length], place + length
            if kind != BYTES:
                (value,) = struct.unpack("<d" if kind == DOUBLE else "<f", value)
        yield tag >> 3, value


def events(path):
    """(step, values by tag or None, whether a session starts) of each event of a file, in order."""
    data, place, found = path.read_bytes(), 0, []
    while place < len(data):
        header = data[place : place + 8]
        (length,) = struct.unpack("<Q", header)
        body = data[place + 12 : place + 12 + length]
        assert struct.unpack("<I", data[place + 8 : place + 12]) == (masked(crc32c(header)),)
        assert struct.unpack("<I", data[place + 12 + length : place + 16 + length]) == (masked(crc32c(body)),)
        place += 16 + length
        event = dict(fields(body))
        assert abs(event[1] - time.time()) < 600
        values = [dict(fields(value)) for _, value in fields(event.get(5, b""))]
        starts = dict(fields(event.get(7, b""))).get(1) == 1
        found.append((event.get(2, 0), {value[1].decode(): value[2] for value in values}, starts))
    return found


def shown(folder):
    """The curves as TensorBoard shows them: files in the order of their names, a session's start forgets what follows
    its step."""
    curves = {}
    for path in sorted(folder.iterdir()):
        assert "tfevents" in path.name
        for step, values, starts in events(path):
            if starts:
                curves = {tag: {at: v for at, v in curve.items() if at < step} for tag, curve in curves.items()}
            for tag, value in values.items():
                curves.setdefault(tag, {})[step] = value
    return curves


def test_event_files_hold_what_was_logged(tmp_path):
    assert crc32c(b"123456789") == 0xE3069283
    with opened(["tensorboard"], tmp_path / "math") as log:
        log(1, {"loss": 2.5, "learning_rate": 1e-4})
        log(2, {"loss": np.float32(1.25)})
        log(2, {"heldout_loss": float("nan")})
    curves = shown(tmp_path / "math")
    assert curves["loss"] == {1: 2.5, 2: 1.25}
    assert curves["learning_rate"] == {1: np.float32(1e-4)}
    assert np.isnan(curves["heldout_loss"][2])


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=5))
def test_a_resumed_finetune_forgets_what_an_earlier_try_logged_beyond(tmp_path_factory, tries):
    folder = tmp_path_factory.mktemp("tries")
    expected = {}
    for number, (start, count) in enumerate(tries):
        expected = {step: value for step, value in expected.items() if step <= start}
        with opened(["tensorboard"], folder / "new", start_step=start) as log:
            for step in range(start + 1, start + 1 + count):
                expected[step] = number + step / 64
                log(step, {"loss": expected[step]})
        # Tries of one second are otherwise in the order of their start.
        for path in (folder / "new").iterdir():
            path.rename(folder / f"{number}.{path.name}")
        (folder / "new").rmdir()
    assert shown(folder) == {"loss": expected}


def test_event_files_can_be_read_while_the_finetune_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "FLUSH_S", 0.0)
    with opened(["tensorboard"], tmp_path) as log:
        log(1, {"loss": 2.0})
        assert shown(tmp_path) == {"loss": {1: 2.0}}


@pytest.mark.parametrize("act", ["write_event", "flush", "close"])
def test_a_full_disk_is_told_once_and_ends_no_finetune(tmp_path, monkeypatch, caplog, act):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tracking, "FLUSH_S", 0.0)
    with opened(["tensorboard"], tmp_path) as log:
        log(1, {"loss": 2.0})
        monkeypatch.setattr(tracking.EventsWriter, act, full)
        for step in range(2, 40):
            log(step, {"loss": 2.0})
    assert [record.getMessage() for record in caplog.records] == [
        "finetune math: tensorboard is told no more ([Errno 28] No space left on device); the finetune goes on"
    ]


def test_a_folder_that_cannot_be_made_ends_no_finetune(tmp_path, caplog):
    (tmp_path / "file").touch()
    with opened(["tensorboard"], tmp_path / "file" / "math") as log:
        log(1, {"loss": 2.0})
    assert "tensorboard is told no more ([Errno 20] Not a directory" in caplog.text


def test_an_error_of_the_finetune_is_not_taken_for_a_tracker_s(tmp_path):
    def fails():
        with opened(["tensorboard"], tmp_path) as log:
            log(1, {"loss": 2.0})
            raise OSError("of the finetune")

    with pytest.raises(OSError, match="of the finetune"):
        fails()
    assert shown(tmp_path) == {"loss": {1: 2.0}}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A client of an MLflow store of its own, which takes seconds to make."""
    mlflow = pytest.importorskip("mlflow")
    folder = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.chdir(folder)
        yield mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")


def stored(store, key="0123456789abcdef"):
    (run,) = [
        run
        for experiment in store.search_experiments(filter_string="name = 'study'")
        for run in store.search_runs([experiment.experiment_id])
        if run.data.tags["gradientspace.key"] == key
    ]
    history = {
        name: [(metric.step, metric.value) for metric in store.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    return run, history


def test_mlflow_keeps_one_run_over_all_tries_of_a_finetune(store, tmp_path):
    with opened(["tensorboard", "mlflow", "mlflow"], tmp_path / "math") as log:
        for step in range(1, 5):
            log(step, {"loss": 8.0 - step, "tokens_per_second": 100.0})
        log(4, {"heldout_loss": 3.5})
    run, history = stored(store)
    assert run.info.run_name == "math"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"learning_rate": "0.0005", "workers": "2", "deepspeed": "{'zero': {'stage': 1}}"}
    assert history["loss"] == [(1, 7.0), (2, 6.0), (3, 5.0), (4, 4.0)]
    assert history["heldout_loss"] == [(4, 3.5)]

    def another_try():
        with opened(["mlflow"], tmp_path / "math", start_step=2, settings=SETTINGS | {"workers": 1}) as log:
            for step in range(3, 7):
                log(step, {"loss": 8.0 - step, "tokens_per_second": 50.0})
            raise ValueError("out of memory")

    with pytest.raises(ValueError, match="out of memory"):
        another_try()
    again, history = stored(store)
    assert again.info.run_id == run.info.run_id
    assert again.info.status == "FAILED"
    assert again.data.params["workers"] == "2"
    assert history["loss"] == [(step, 8.0 - step) for step in range(1, 7)]
    assert history["tokens_per_second"] == [(step, 100.0 if step < 5 else 50.0) for step in range(1, 7)]
    with opened(["mlflow"], tmp_path, finetune="stories", key="f" * 16) as log:
        log(1, {"loss": 1.0})
    assert stored(store, "f" * 16)[1] == {"loss": [(1, 1.0)]}


def test_mlflow_has_the_steps_while_the_finetune_runs(store, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "SEND_S", 0.0)
    with opened(["mlflow"], tmp_path, key="e" * 16, settings={"deepspeed": "z" * 9000}) as log:
        log(1, {"loss": 2.0})
        run, history = stored(store, "e" * 16)
        assert (run.info.status, history) == ("RUNNING", {"loss": [(1, 2.0)]})


def test_mlflow_takes_thousands_of_values_at_the_end(store, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "SEND_S", 600.0)
    with opened(["mlflow"], tmp_path, key="d" * 16) as log:
        for step in range(1, 1201):
            log(step, {"loss": step / 2, "grad_norm": 1.0})
    assert stored(store, "d" * 16)[1]["loss"] == [(step, step / 2) for step in range(1, 1201)]


def told(caplog):
    return [record.getMessage() for record in caplog.records if record.name == tracking.__name__]


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("http://127.0.0.1:9", "API request to http://127.0.0.1:9/"),
        ("nowhere://", "Model registry functionality is unavailable"),
        ("sqlite:///garbage.db", "(sqlite3.DatabaseError) file is not a database"),
        ("sqlite:////proc/nowhere/mlflow.db", "[Errno 2] No such file or directory"),
    ],
)
def test_an_mlflow_that_cannot_be_opened_ends_no_finetune(store, tmp_path, monkeypatch, caplog, uri, reason):
    (tmp_path / "garbage.db").write_text("not a database" * 100)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with caplog.at_level(logging.WARNING, tracking.__name__), opened(["mlflow", "tensorboard"], tmp_path / "tb") as log:
        log(1, {"loss": 2.0})
    (warning,) = told(caplog)
    assert reason.strip() in warning
    assert warning.startswith("finetune math: mlflow is told no more (")
    assert shown(tmp_path / "tb") == {"loss": {1: 2.0}}


def test_an_mlflow_that_goes_away_is_told_no_more(store, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tracking, "SEND_S", 0.0)
    with caplog.at_level(logging.WARNING, tracking.__name__), opened(["mlflow"], tmp_path, key="c" * 16) as log:
        log(1, {"loss": 2.0})
        store.delete_run(stored(store, "c" * 16)[0].info.run_id)
        for step in range(2, 9):
            log(step, {"loss": 2.0})
    (warning,) = told(caplog)
    assert "mlflow is told no more (The run" in warning


def logged(path):
    """The records of a W&B file: a header of 7 bytes, then LevelDB's log in blocks of 32 kB."""
    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        record, place = record + data[place + 7 : place + 7 + length], place + 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def test_wandb_keeps_the_values_in_files_when_it_is_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    with opened(["wandb"], tmp_path, start_step=2) as log:
        log(3, {"loss": 2.5})
        log(3, {"heldout_loss": 2.25})
        log(4, {"loss": 1.5})
    (path,) = tmp_path.glob("wandb/offline-run-*/run-0123456789abcdef.wandb")
    # W&B's process may write it a moment after the run is finished.
    end, records = time.monotonic() + 30, []
    while not any(record.HasField("exit") for record in records) and time.monotonic() < end:
        time.sleep(0.05)
        records = [Record.FromString(record) for record in logged(path)]
    (run,) = [record.run for record in records if record.HasField("run")]
    assert (run.project, run.display_name, run.run_id) == ("study", "math", "0123456789abcdef")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert SETTINGS.items() <= config.items()
    rows = [record.history for record in records if record.HasField("history")]
    values = [
        {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in history.item} for history in rows
    ]
    kept = [{name: value for name, value in row.items() if not name.startswith("_")} for row in values]
    assert [history.step.num for history in rows] == [3, 4]
    assert kept == [{"loss": 2.5, "heldout_loss": 2.25}, {"loss": 1.5}]
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [0]


def test_wandb_is_told_of_no_step_twice(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    calls, options = [], {}
    run = SimpleNamespace(
        step=5,
        log=lambda values, step: calls.append((step, values)),
        finish=lambda exit_code: calls.append(exit_code),
    )
    monkeypatch.setattr(wandb, "init", lambda **given: options.update(given) or run)

    def interrupted():
        with opened(["wandb"], tmp_path, start_step=2) as log:
            for step in range(3, 7):
                log(step, {"loss": 1.0})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert calls == [(5, {"loss": 1.0}), (6, {"loss": 1.0}), 1]
    assert (options["id"], options["resume"]) == ("0123456789abcdef", "allow")


@pytest.mark.parametrize("error", ["CommError", "UsageError"])
def test_a_wandb_that_refuses_ends_no_finetune(tmp_path, monkeypatch, caplog, error):
    wandb = pytest.importorskip("wandb")

    def refuse(**_):
        raise getattr(wandb.errors, error)("refused\nfor a long reason")

    monkeypatch.setattr(wandb, "init", refuse)
    with caplog.at_level(logging.WARNING, tracking.__name__), opened(["wandb"], tmp_path) as log:
        log(1, {"loss": 2.0})
    assert told(caplog) == ["finetune math: wandb is told no more (refused); the finetune goes on"]


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_missing_package_is_named_with_its_mend(tmp_path, monkeypatch, name):
    mend = rf"^trackers: {name} cannot be loaded \(not installed\); pip install 'gradientspace-ray\[{name}\]'$"
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TrainingError, match=mend):
        check_trackers(["tensorboard", name])
    with pytest.raises(TrainingError, match=mend), opened(["tensorboard", name], tmp_path / "math"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_package_that_does_not_load_is_named_with_its_mend(store, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow.entities", None)
    mend = r"^trackers: mlflow cannot be loaded \(.*mlflow\.entities.*\); pip install"
    with pytest.raises(TrainingError, match=mend), opened(["mlflow"], tmp_path):
        pass


def test_installed_trackers_are_found():
    pytest.importorskip("mlflow")
    pytest.importorskip("wandb")
    check_trackers(["tensorboard", "mlflow", "wandb"])
    check_trackers([])


def test_without_trackers_nothing_is_written(tmp_path):
    with opened([], tmp_path / "math") as log:
        log(1, {"loss": 1.0})
    assert os.listdir(tmp_path) == []
