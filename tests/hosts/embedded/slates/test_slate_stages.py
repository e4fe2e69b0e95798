"""The stages from the hand-over to aligned slates: files, resuming, mistakes, and the ablation."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gin
import numpy as np
import pytest
import torch
from small_task import without_costs

from hpgr_plugin.cli import run_configured
from hpgr_plugin.config.registry import build
from hpgr_plugin.config.scopes import check_scopes
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.embedded.report.evaluation import Task
from hpgr_plugin.hosts.embedded.slates.artefact import (
    ArtefactError,
    load_model,
    load_tokens,
    save_tokens,
)
from hpgr_plugin.hosts.embedded.slates.evaluation import outcomes
from hpgr_plugin.hosts.embedded.slates.model import padded_slates
from hpgr_plugin.hosts.embedded.slates.stages import (
    AlignSettings,
    SlateSettings,
    TrainedSlates,
    align,
    build_slate_model,
    train_slates,
)
from hpgr_plugin.hosts.embedded.slates.tokenize import (
    Tokenized,
    TokenizeSettings,
    read_vectors,
    tokenize,
)
from hpgr_plugin.hosts.embedded.slates.worse import WorseSlates
from hpgr_plugin.hosts.embedded.train.trainer import Trainer, TrainingRun
from hpgr_plugin.report.__main__ import main as report

Configure = Callable[..., Task]
Training = Callable[..., TrainingRun]
ROWS = ["sasrec", "hstu", "tiger", "onerec", "higr", "higr_aligned", "no_planner"]


@pytest.fixture
def vectors(configure: Configure, tmp_path: Path) -> Path:
    """A file of item vectors: clusters of ten items around a centre."""
    task = configure()
    rng = np.random.default_rng(0)
    cluster = task.data.log.item_ids.astype(int) // 10
    values = rng.normal(size=(cluster.max() + 1, 16))[cluster]
    path = tmp_path / "vectors.npy"
    np.save(path, (values + 0.3 * rng.normal(size=values.shape)).astype(np.float32))
    return path


def tokenizer_of(vectors: Path, **changes: Any) -> TokenizeSettings:
    return build("TokenizeSettings", embeddings=str(vectors), **changes)


def slates_of(tokens: Tokenized, **changes: Any) -> SlateSettings:
    return build("SlateSettings", tokens=str(tokens.tokens), **changes)


def alignment_of(tokens: Tokenized, model: TrainedSlates, **changes: Any) -> AlignSettings:
    files = {"tokens": str(tokens.tokens), "model": str(model.model)}
    return build("AlignSettings", **files, **changes)


def test_modes_of_run_from_stage_1_to_aligned_slates(
    run_file: Callable[..., Path], tmp_path: Path
) -> None:
    def run(mode: str, *bindings: str) -> dict[str, Any]:
        gin.clear_config()
        out = tmp_path / mode
        lines = [f"hpgr.run.mode = '{mode}'", f"hpgr.run.output_dir = '{out}'", *bindings]
        run_configured(str(run_file(*lines)), [])
        metrics: dict[str, Any] = json.loads((out / "results.json").read_text())["metrics"]
        return metrics

    handoff = run("pretrain")["handoff"]
    tokens = run("tokenize", f"hpgr.TokenizeSettings.embeddings = '{handoff}'")
    assert {"collision_rate", "codebook_use", "consistency", "reconstruction"} <= tokens.keys()
    slates = run(
        "slates",
        f"hpgr.SlateSettings.tokens = '{tokens['tokens']}'",
        f"hpgr.SlateModel.pretrained = '{handoff}'",
    )
    aligned = run(
        "align",
        f"hpgr.AlignSettings.model = '{slates['model']}'",
        f"hpgr.AlignSettings.tokens = '{tokens['tokens']}'",
    )
    for metrics in (slates, aligned):
        assert {f"{name}@5" for name in ("hit", "recall", "ndcg", "liked_ndcg")} <= metrics.keys()
        assert Path(metrics["model"]).is_file()
    gin.clear_config()


@pytest.mark.parametrize("stage", ["tokenize", "slates", "align"])
def test_resuming_gives_the_same_numbers(
    stage: str,
    configure: Configure,
    training: Training,
    vectors: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = configure("DROPOUT = 0.5")
    tokens = tokenize(task.data, tokenizer_of(vectors), training("t"))
    model = train_slates(task, slates_of(tokens), training("m"))

    def run(target: TrainingRun) -> dict[str, Any]:
        if stage == "tokenize":
            settings = tokenizer_of(vectors, checkpoint_every=1)
            return tokenize(task.data, settings, target).metrics
        if stage == "slates":
            return train_slates(task, slates_of(tokens, checkpoint_every=1), target).metrics
        settings = alignment_of(tokens, model, checkpoint_every=1, learning_rate=0.05)
        return align(task, settings, target).metrics

    whole = run(training("whole"))
    step, count = Trainer._step, 0

    def interrupted(self: Trainer, batch: object) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(training("parts"))
    assert without_costs(run(training("parts", resume=True))) == without_costs(whole)


def test_the_ablation(run_file: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    lines = ["hpgr.run.mode = 'slate_ablation'", f"hpgr.run.output_dir = '{out}'"]
    lines += [f"hpgr.run.rows = {ROWS}", "hpgr.run.seeds = [0, 1]"]
    config = str(run_file(*lines, "hpgr.SlateSettings.epochs = 1"))
    run_configured(config, [])
    content = json.loads((out / "results.json").read_text())
    metrics = content["metrics"]
    assert [row["scope"] for row in metrics["rows"]] == ROWS
    assert all(len(row["seeds"]) == 2 for row in metrics["rows"])
    assert metrics["best_rival"] in ROWS[:4]
    assert set(metrics["tokenizers"]) == {"crq_vae", "no_contrast", "rq_vae", "rq_kmeans"}
    for row in metrics["rows"]:
        assert (row["scope"] == metrics["best_rival"]) != ("difference" in row)
    text = (out / "table.md").read_text()
    assert "HiGR, aligned (ORPO)" in text
    assert "what came next:" in text
    assert report(["slates", "--results", str(out), "--out", str(tmp_path / "report")]) == 0
    written = (tmp_path / "report" / "slates.md").read_text()
    assert written.startswith(text.split("\n\n")[0])
    assert "slates,higr,1,ndcg@5," in (tmp_path / "report" / "slates.csv").read_text()
    before = (out / "results.json").stat().st_mtime_ns
    gin.clear_config()
    run_configured(config, [])  # it is finished: nothing to do
    assert (out / "results.json").stat().st_mtime_ns == before
    gin.clear_config()


def test_the_report_of_another_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "none"):
        assert report(["slates", "--results", str(folder)]) == 2
        assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("loss", ["orpo", "dpo", "simpo"])
def test_alignment_raises_the_odds_of_what_was_liked(
    loss: str, configure: Configure, training: Training, vectors: Path
) -> None:
    task = configure()
    tokens = tokenize(task.data, tokenizer_of(vectors), training("t"))
    model = train_slates(task, slates_of(tokens), training("m"))
    settings = alignment_of(
        tokens, model, loss=loss, epochs=12, patience=12, learning_rate=3e-3,
        objectives=("interest",), warmup_steps=1,
    )  # fmt: skip
    kept: list[float] = []
    step = Trainer._step

    def watched(self: Trainer, batch: object) -> torch.Tensor:
        kept.append(float(step(self, batch)))
        return torch.tensor(kept[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", watched)
        align(task, settings, training("a"))
    count = max(2, len(kept) // 4)
    assert np.mean(kept[-count:]) < np.mean(kept[:count])


def test_alignment_that_helps_no_validation_keeps_the_start(
    configure: Configure, training: Training, vectors: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = configure("NUM_USERS = 100")
    tokens = tokenize(task.data, tokenizer_of(vectors), training("t"))
    settings = slates_of(tokens, epochs=12, patience=12, learning_rate=3e-3)
    model = train_slates(task, settings, training("m"))
    destructive = alignment_of(tokens, model, learning_rate=10.0, epochs=1, warmup_steps=0)
    with caplog.at_level("INFO", logger="hpgr_plugin"):
        made = align(task, destructive, training("a"))
    assert made.metrics["kept_start"]
    assert "the start is kept" in caplog.text
    assert [row["step"] > 0 for row in made.metrics["history"]] == [False, True]
    start, aligned = (load_model(x.model)[0].state_dict() for x in (model, made))
    assert all(torch.equal(start[name], aligned[name]) for name in start)
    assert made.metrics["ndcg@5"] == model.metrics["ndcg@5"]


@pytest.mark.parametrize("objective", ["interest", "diversity"])
def test_worse_slates_hold_nothing_that_the_user_takes_in_training(
    objective: str, configure: Configure, training: Training, vectors: Path
) -> None:
    """Before and after the request alike; what validation and test hold is not looked at."""
    task = configure("hpgr.SyntheticReader.items_per_cluster = 40")
    data = task.data
    values = torch.randn(data.log.num_items, 16, generator=torch.Generator().manual_seed(0))
    worse = WorseSlates(
        data, values, training("a"), slate_size=5, objectives=(objective,), diversity="similar"
    )
    taken = np.zeros((data.log.num_users, data.log.num_items), dtype=bool)
    taken[data.log.event_users()[data.split == 0], data.log.item[data.split == 0]] = True
    unseen = worse.taken.mask(torch.arange(data.log.num_users)).numpy()
    assert np.array_equal(unseen, taken)
    for batch in task.loader("train").batches():
        better, lengths = padded_slates(batch, 5)
        drawn = worse.draw(batch, better, lengths, 0)[:, 1 if objective == "diversity" else 0 :]
        assert not taken[batch.users.numpy()[:, None], drawn.numpy()].any()


def test_several_trainings_at_a_time_fill_the_table(
    run_file: Callable[..., Path], tmp_path: Path
) -> None:
    """An aligned row waits for the row that it starts from, wherever each was trained."""
    out, rows = tmp_path / "out", ["higr", "higr_aligned", "hstu"]
    lines = ["hpgr.run.mode = 'slate_ablation'", f"hpgr.run.output_dir = '{out}'"]
    lines += [f"hpgr.run.rows = {rows}", "hpgr.run.workers = 2", "hpgr.SlateSettings.epochs = 1"]
    run_configured(str(run_file(*lines)), [])
    metrics = json.loads((out / "results.json").read_text())["metrics"]
    assert [row["scope"] for row in metrics["rows"]] == rows
    assert all(len(row["seeds"]) == 1 for row in metrics["rows"])
    assert all(len(seeds) == 1 for seeds in metrics["tokenizers"].values())
    gin.clear_config()


def test_a_saved_model_gives_the_same_slates(
    configure: Configure, training: Training, vectors: Path
) -> None:
    task = configure("hpgr.SlateModel.sem = @hpgr.SessionEnhancementModule()")
    tokens = tokenize(task.data, tokenizer_of(vectors), training("t"))
    made = train_slates(task, slates_of(tokens), training("m"))
    model, item_ids = load_model(made.model)
    assert item_ids == task.data.log.item_ids.tolist()
    found = outcomes(model, task.loader("test"), task.process)
    assert found.metrics() == {key: made.metrics[key] for key in found.metrics()}


def test_slates_never_hold_an_item_of_the_history(
    configure: Configure, training: Training, vectors: Path
) -> None:
    task = configure("hpgr.SyntheticReader.items_per_cluster = 40")
    rng = np.random.default_rng(0).normal(size=(task.data.log.num_items, 16))
    np.save(vectors, rng.astype(np.float32))
    tokens = tokenize(task.data, tokenizer_of(vectors), training("t"))
    for scope in ("higr", "tiger", "onerec", "hstu"):
        with gin.config_scope(scope):
            model = build_slate_model(task, tokens=tokens.tokens).eval()
        for batch in task.loader("test").batches():
            slates = model.generate(batch).items
            excluded = model._excluded(batch)
            assert not excluded.gather(1, slates).any()
            assert (slates.sort(1).values.diff(dim=1) > 0).all()


def test_a_history_ends_before_its_slate(configure: Configure) -> None:
    for batch in configure().loader("train").batches():
        for start, end, first in zip(
            batch.history_offsets[:-1], batch.history_offsets[1:], batch.candidate_offsets[:-1],
            strict=True,
        ):  # fmt: skip
            if end > start:
                times = batch.history_timestamps[start:end]
                assert times.max() < batch.candidate_timestamps[first]


def test_training_learns_the_next_slates(
    configure: Configure, training: Training, vectors: Path
) -> None:
    """The loss falls, and slates hit more than those of a model that was not trained."""
    task = configure("NUM_USERS = 100")
    tokens = tokenize(task.data, tokenizer_of(vectors), training("t"))
    settings = slates_of(tokens, epochs=12, patience=12, learning_rate=3e-3)
    untrained = build_slate_model(task, tokens=tokens.tokens).eval()
    before = outcomes(untrained, task.loader("test"), task.process).metrics()
    made = train_slates(task, settings, training("m"))
    assert made.metrics["hit@5"] > before["hit@5"]


@pytest.mark.parametrize(
    ("bindings", "words"),
    [
        (["hpgr.RequestSettings.history = 'candidate'"], "RequestSettings.history takes 'request'"),
        (["hpgr.RequestSettings.max_candidates = 6"], "max_candidates = 6 is more than"),
        (["hpgr.SlateModel.max_history = 9"], "max_history = 60 is more than"),
        (["hpgr.SlateModel.slate_size = 1000"], "slate_size takes at most"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(
    configure: Configure, bindings: list[str], words: str
) -> None:
    task = configure("hpgr.SlateModel.decoder = None", *bindings)
    with pytest.raises(HpgrError, match=words):
        build_slate_model(task)


def test_a_decoder_without_tokens_is_refused(configure: Configure) -> None:
    with pytest.raises(HpgrError, match="decoder needs semantic ids"):
        build_slate_model(configure())


def test_stages_without_their_files_are_refused(configure: Configure, training: Training) -> None:
    task = configure()
    with pytest.raises(HpgrError, match=r"TokenizeSettings\.embeddings takes a hand-over"):
        tokenize(task.data, build("TokenizeSettings"), training())
    with pytest.raises(HpgrError, match=r"AlignSettings\.model takes a file"):
        align(task, build("AlignSettings"), training())
    with pytest.raises(HpgrError, match="some of"):
        replace(build("AlignSettings"), objectives=("speed",))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.zeros((3, 4), np.float32), r"takes finite floats \[\d+, E\]"),
        (np.zeros(5), r"takes finite floats"),
        (np.zeros((3, 4), np.int64), r"takes finite floats"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(
    configure: Configure, tmp_path: Path, values: np.ndarray, words: str
) -> None:
    path = tmp_path / "v.npy"
    np.save(path, values)
    with pytest.raises(HpgrError, match=words):
        read_vectors(path, configure().data)
    path.write_bytes(b"no numpy")
    with pytest.raises(HpgrError, match=r"damaged or no \.npy file"):
        read_vectors(path, configure().data)


def test_damaged_and_foreign_files_are_refused(
    configure: Configure, training: Training, vectors: Path
) -> None:
    task = configure()
    made = tokenize(task.data, tokenizer_of(vectors), training("t"))
    digest = task.data.log.item_vocabulary_digest
    tokens = load_tokens(made.tokens, vocabulary_digest=digest)
    with pytest.raises(ArtefactError, match="of other items"):
        load_tokens(made.tokens, vocabulary_digest="other")
    with pytest.raises(ArtefactError, match="version and kind"):
        load_model(made.tokens)
    content = bytearray(made.tokens.read_bytes())
    content[-3] ^= 1
    made.tokens.write_bytes(content)
    with pytest.raises(ArtefactError, match="differs from its checksum"):
        load_tokens(made.tokens, vocabulary_digest=digest)
    save_tokens(made.tokens, tokens, vocabulary_digest=digest)
    again = load_tokens(made.tokens, vocabulary_digest=digest)
    assert torch.equal(again.ids.codes, tokens.ids.codes)


def test_items_that_come_later_get_ids_of_their_own(
    configure: Configure, training: Training, vectors: Path
) -> None:
    task = configure()
    made = tokenize(task.data, tokenizer_of(vectors), training("t"))
    tokens = load_tokens(made.tokens, vocabulary_digest=task.data.log.item_vocabulary_digest)
    more = tokens.with_items(tokens.vectors[:3])  # the same vectors: they collide
    assert torch.equal(more.codes[:-3], tokens.ids.codes)
    assert torch.equal(more.codes[-3:, :-1], tokens.ids.codes[:3, :-1])
    assert len(more.codes.unique(dim=0)) == len(more.codes)


def test_a_collapsed_codebook_is_said(
    configure: Configure, training: Training, vectors: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = configure(
        "hpgr.TokenizeSettings.tokenizer = @hpgr.ResidualKMeans",
        "hpgr.TokenizeSettings.index_size = 1000",
    )
    one = np.zeros((task.data.log.num_items, 4), np.float32)
    np.save(vectors, one)
    made = tokenize(task.data, tokenizer_of(vectors), training("t"))
    assert "level 1 has collapsed" in made.metrics["warnings"][0]
    assert "has collapsed" in caplog.text


def test_a_scope_of_tokenizers_that_does_not_exist_is_refused(configure: Configure) -> None:
    configure("hpgr.run.tokenizers = ['crq_vea']")
    with pytest.raises(HpgrError, match="'crq_vea' is entered and has no bindings"):
        check_scopes()
