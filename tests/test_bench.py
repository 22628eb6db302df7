"""The measurements run, at a size that takes seconds, and report what they must.

No speed is ever asserted.
"""

import doctest
import json
import os
import shutil

import pytest
import torch
from conftest import assert_refused, program

import train
from bench import (
    bound,
    data_speed,
    embed_speed,
    machine_code,
    measure,
    model_speed,
    peers,
    pictures,
    speedrun,
    step_profile,
)
from starencoder import StarEncoderConfig, StarEncoderForPreTraining

SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)


def number(text):
    return float(text.replace(",", ""))


@pytest.mark.slow
def test_model_speed_compares_the_same_tokens(small_corpus, tmp_path):
    config = StarEncoderConfig(
        vocab_size=600, max_position_embeddings=48, pad_token_id=596, **SHAPE
    )
    path = tmp_path / "model.json"
    model_speed.bench_model(str(path), config, (2, 3), small_corpus, repetitions=2)
    result = json.loads(path.read_text())
    rows = result["rows"]
    assert {row["by"] for row in rows} >= {
        "transformers BertForPreTraining, sdpa",
        "StarEncoder",
        "StarEncoder, logits of all tokens",
        "ModernBERT-base, sdpa",
    }
    assert len({row["lengths"] for row in rows}) == 2
    assert result["versions"]["torch"] and result["commit"]
    assert all(number(row["tokens/s"]) > 0 for row in rows)


def test_both_ways_to_the_loss_agree():
    """The contender with the logits of all tokens computes what the model's own loss is."""
    config = StarEncoderConfig(
        vocab_size=600, max_position_embeddings=48, pad_token_id=596, **SHAPE
    )
    batch = model_speed.random_batch([48, 20, 7], config)
    model = StarEncoderForPreTraining(config).to(model_speed.DEVICE).eval()
    own = model_speed.own_loss(model, batch)
    other = model_speed.loss_of_all_tokens(model, batch)
    torch.testing.assert_close(own, other)


def test_profile_splits_the_whole_step(tmp_path):
    shape = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256)
    config = StarEncoderConfig(
        vocab_size=600, max_position_embeddings=256, pad_token_id=596, **shape
    )
    # Measured ceilings would take minutes on a CPU without instructions for bf16.
    ceilings = {"matmul": 1e11, "copy": 1e10}
    path = tmp_path / "profile.json"
    step_profile.bench_profile(str(path), config, 1, ceilings, repetitions=2)
    *parts, whole = json.loads(path.read_text())["rows"]
    milliseconds = {row["part"]: number(row["ms"]) for row in parts}
    assert milliseconds.keys() == {*step_profile.PARTS, "gaps"}
    assert whole["part"] == "step, by itself"
    assert all(milliseconds[part] > 0 for part in step_profile.PARTS)


def test_original_lengths_are_quantiles(small_corpus):
    lengths = model_speed.original_lengths(small_corpus, 48, 8)
    assert lengths == sorted(lengths) and len(lengths) == 8
    assert 1 <= lengths[0] <= lengths[-1] <= 48


@pytest.mark.slow
def test_data_speed(small_corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # which the measurement sets for good
    threads = torch.get_num_threads()
    data_speed.bench_data(str(tmp_path / "data.json"), small_corpus, repetitions=1)
    torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "data.json").read_text())["rows"]
    assert len(rows) == 2 and all(number(row["tokens/s"]) > 0 for row in rows)


@pytest.mark.slow
def test_embed_speed(small_corpus, tmp_path, monkeypatch):
    """All embed the same texts, and to the same vectors."""
    monkeypatch.setattr(embed_speed, "LARGE_TEXTS", 1)
    shutil.copy(os.path.join(small_corpus, "tokenizer.json"), tmp_path)
    sizes = dict(vocab_size=600, max_position_embeddings=64, pad_token_id=0)
    config = StarEncoderConfig(**sizes, **SHAPE)
    StarEncoderForPreTraining(config).save_pretrained(str(tmp_path))
    path = tmp_path / "embed.json"
    embed_speed.bench_embed(str(path), str(tmp_path), size=20_000, sample=3_000, repetitions=2)
    rows = json.loads(path.read_text())["rows"]
    assert {row["texts"] for row in rows} >= {"functions", "files", "functions, all"}
    for row in rows:
        assert number(row["tokens/s"]) > 0
        rounded = row["by"] == "starencoder" or "bf16" in row["by"]
        assert float(row["1 - cosine"]) < (1e-3 if rounded else 1e-5), row


def test_python_files_are_no_larger_than_asked():
    files, total = measure.python_files(200_000)
    assert len(files) == len(set(files)) > 5 and 100_000 < total <= 200_000


@pytest.mark.slow
def test_pictures_of_a_run(small_corpus, tmp_path):
    config = train.TrainConfig(
        data=small_corpus, out=str(tmp_path / "run"), max_length=48, steps=2, batch_size=2,
        eval_examples=2, workers=0, device="cpu", hidden_size=32, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=64,
    )  # fmt: skip
    train.train(config)
    pictures.draw_pictures(config.out, str(tmp_path / "pictures"))
    for name in ("tiny-curves.png", "filled-masks.png"):
        content = (tmp_path / "pictures" / name).read_bytes()
        assert content.startswith(b"\x89PNG") and 10_000 < len(content) < 120_000


def test_refusals():
    if not torch.cuda.is_available():
        assert_refused(program("bench", "kernels", "--tune"), "needs a CUDA device")
    assert_refused(program("bench", "speed"), "invalid choice")
    assert_refused(program("bench", "model", "--tune"), "unrecognized arguments: --tune")
    assert_refused(program("bench", "kernels", "--tune", "--resources"), "not allowed with")


def recipe_file(directory, name, **fields):
    path = directory / name
    path.write_text(json.dumps({"idea": "for a test", "fields": fields}))
    return str(path)


@pytest.mark.slow
def test_a_speedrun_is_raced_and_verified(small_corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speedrun, "HELD_OUT", 64)
    schedule = dict(steps=4, batch_size=8, micro_batch_size=8, warmup_steps=1, eval_every=2)
    record = recipe_file(tmp_path, "record.json", **schedule)
    yours = recipe_file(tmp_path, "yours.json", **schedule, muon_learning_rate=0.01, masked=0.3)
    result = tmp_path / "result.json"
    far = dict(directory=small_corpus, target=100.0)  # both are there at their first evaluation
    speedrun.bench_speedrun(yours, record, 2, str(result), **far)
    assert "times as fast as the record (95 %:" in capsys.readouterr().out
    claimed = json.loads(result.read_text())
    rows = claimed["rows"]
    assert [row["recipe"] for row in rows] == ["record", "record", "yours", "yours"]
    assert all(row["steps"] == 2 and row["seconds"] > 0 for row in rows)
    low, high = claimed["interval"]
    assert low <= claimed["ratio"] <= high

    speedrun.verify(str(result), small_corpus)
    assert "verified bit for bit" in capsys.readouterr().out
    first = next(row for row in rows if row["recipe"] == "yours")
    first["held-out loss"] += 1e-9  # not the same bits
    result.write_text(json.dumps(claimed))
    with pytest.raises(ValueError, match="not verified"):
        speedrun.verify(str(result), small_corpus)
    claimed["processor"] = "another"
    result.write_text(json.dumps(claimed))
    speedrun.verify(str(result), small_corpus)
    assert "within tolerance, on another machine" in capsys.readouterr().out
    first["held-out loss"] += 0.1
    result.write_text(json.dumps(claimed))
    with pytest.raises(ValueError, match="not verified"):
        speedrun.verify(str(result), small_corpus)

    with pytest.raises(ValueError, match="not every run came down to 0.1"):
        speedrun.bench_speedrun(yours, record, 2, str(result), small_corpus, target=0.1)


def test_recipes_and_their_rules(tmp_path):
    record, recipe = speedrun.contenders_of(None, None)
    assert os.path.basename(recipe) > os.path.basename(record)
    assert speedrun.contenders_of(None, recipe) == (record, recipe)  # it does not race itself
    assert speedrun.contenders_of(recipe, record) == (recipe, record)
    assert speedrun.read_recipe(record)["hidden_size"] == 192
    for fields, words in (
        (dict(hidden_size=384), "hidden_size must be 192"),
        (dict(max_length=128), "max_length must be 64"),
        (dict(colour="red"), "colour"),
        (dict(steps=0), "steps must be at least 1"),
        (dict(steps=2.5), "steps = 2.5"),
        (dict(batch_size=True), "batch_size = True"),
        (dict(masked=1.5), "masked must lie between 0 and 1"),
        (dict(hidden_dropout_prob=1), "hidden_dropout_prob"),
        (dict(head_start=5), "head_start = 5"),
    ):
        with pytest.raises(ValueError, match=words):
            speedrun.read_recipe(recipe_file(tmp_path, "wrong.json", **fields))
    (tmp_path / "wrong.json").write_text("{}")
    with pytest.raises(ValueError, match="a recipe is"):
        speedrun.read_recipe(str(tmp_path / "wrong.json"))
    assert_refused(program("bench", "speedrun", str(tmp_path / "wrong.json")), "a recipe is")
    assert_refused(program("bench", "speedrun", "--seeds", "1"), "must lie between 2 and 10")
    nowhere = str(tmp_path / "no.json")
    assert_refused(program("bench", "speedrun", "--verify", nowhere), "No such file", "no.json")
    assert_refused(program("bench", "speedrun", nowhere), "No such file", "no.json")
    (tmp_path / "wrong.json").write_text('{"rows": [{"recipe": "yours", "seed": 0}]}')
    wrong = str(tmp_path / "wrong.json")
    assert_refused(program("bench", "speedrun", "--verify", wrong), "not a result of this program")


def test_the_interval_of_a_ratio():
    assert speedrun.ratio_of_times([2.0, 2.0, 2.0]) == pytest.approx((2.0, 2.0, 2.0))
    ratio, low, high = speedrun.ratio_of_times([2.0, 8.0])
    assert ratio == pytest.approx(4.0)
    # Logarithms ln 4 -+ ln 2: a standard error of ln 2, times Student's 12.71 for two seeds.
    assert high / ratio == pytest.approx(2**12.71) and ratio / low == pytest.approx(2**12.71)


# Machine code as nvdisasm prints it: two loops within another, for whole blocks and for the masked
# partial one, and a rare case behind the end that jumps back.
SASS = """
//--------------------- .text._kernel --------------------------
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   MOV R1, RZ ;
.L_x_1:
        /*0020*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0030*/                   WARPGROUP.ARRIVE ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], R24, gsb0 ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/                   HFMA2.MMA R3, -RZ, RZ, 0, 0 ;
        /*0080*/                   STS.128 [R5], R8 ;
        /*0090*/              @!P1 LDS R6, [R5+0x4] ;
        /*00a0*/               @P2 BRA `(.L_x_3) ;
        /*00b0*/                   NOP;
.L_x_2:
        /*00c0*/              @!P0 BRA `(.L_x_1) ;
.L_x_4:
        /*00d0*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0 ;
        /*00e0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00f0*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], R24, gsb0 ;
        /*0100*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0110*/                   ISETP.GE.AND P1, PT, R1, R2, PT ;
        /*0120*/                   FSEL R24, R24, -INF , !P1 ;
        /*0130*/                   FSEL R25, R25, -INF , !P1 ;
        /*0140*/                   FSEL R26, R26, -INF , !P1 ;
        /*0150*/                   FSEL R27, R27, -INF , !P1 ;
        /*0160*/                   FSEL R28, R28, -INF , !P1 ;
        /*0170*/                   FSEL R29, R29, -INF , !P1 ;
        /*0180*/               @P0 BRA `(.L_x_4) ;
        /*0190*/               @P3 BRA `(.L_x_0) ;
        /*01a0*/                   EXIT ;
.L_x_3:
        /*01b0*/                   MOV R3, R4 ;
        /*01c0*/                   BRA `(.L_x_2) ;
.L_x_5:
        /*01d0*/                   BRA `(.L_x_5);
"""


def test_the_hottest_loop_of_machine_code():
    """Of two innermost loops with as many products, the one without masks counts."""
    instructions, labels = machine_code.parse(SASS)
    loops = machine_code.innermost_loops(instructions, labels)
    assert [len(loop) for loop in loops] == [11, 12]
    code, counted_in = machine_code.hottest_code(SASS)
    assert machine_code.code_figures(code, counted_in) == {
        "counted in": "loop", "instructions": 10, "waits": 1,
        "HGMMA": 2, "HMMA": 0, "STS": 1, "LDS": 1, "BAR": 1,
    }  # fmt: skip
    assert machine_code.class_counts(code) == {
        "tensor": 2, "shared": 2, "synchronization": 3, "other": 2, "integer": 1,
        "transcendental": 0, "float": 0, "global": 0,
    }  # fmt: skip
    predicate = next(i.predicate for i in instructions if i.opcode == "LDS")
    assert predicate == "@!P1"


def test_machine_code_without_a_loop_counts_as_a_whole():
    lines = SASS.splitlines()
    straight = "\n".join(line for line in lines if "BRA" not in line)
    figures = machine_code.code_figures(*machine_code.hottest_code(straight))
    assert figures["counted in"] == "kernel" and figures["instructions"] == 23
    assert figures["HGMMA"] == 4 and figures["waits"] == 3


def test_warnings_of_ptxas():
    assert doctest.testmod(machine_code).failed == 0
    assert machine_code.warning_codes("ptxas info    : Used 168 registers, used 1 barriers") == []


def test_a_peer_that_is_not_installed_costs_one_line(monkeypatch, capsys):
    def broken(module, chip, dtype):
        raise RuntimeError("another signature\nand more")

    missing = peers.Peer("Missing", "missing", "no_such_module", 64, broken)
    present = peers.Peer("Broken", None, None, 64, broken)
    monkeypatch.setattr(peers, "PEERS", (missing, present))
    installed = peers.installed_peers()
    assert installed == [(present, None)] and peers.versions(installed) == {}
    peers.compile_peer(present, None, 90, torch.bfloat16, compiler=None)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "Missing: not available here (No module named 'no_such_module')"
    assert second.startswith("Broken, sm_90: not available here (")


def test_the_bound_by_hand():
    """Each pipe in turn decides."""
    assert doctest.testmod(bound).failed == 0

    def clocks(chip, tensor_flops=0, shared_bytes=0, **instructions):
        return bound.predicted(bound.Counts(instructions, tensor_flops, shared_bytes), chip)

    # Products: 2,048 FLOP a clock on an A100 and 4,096 on an H100, 128 bytes a clock on both.
    assert clocks(80, tensor_flops=8192) == 4.0
    assert clocks(90, tensor_flops=8192) == 2.0
    assert clocks(90, tensor_flops=8192, shared_bytes=640) == 5.0
    # The others: 32 threads on 64 or 128, 64 and 16 lanes; 4 instructions issued a clock.
    assert clocks(80, float=8) == 4.0
    assert clocks(90, float=8) == 2.0
    assert clocks(80, integer=8, float=2) == 4.0
    assert clocks(80, transcendental=8, integer=15, float=2) == 16.0
    assert clocks(90, synchronization=8, other=32) == 10.0
    # The two halves one after the other.
    assert clocks(90, tensor_flops=8192, shared_bytes=128, transcendental=3) == 8.0
    with pytest.raises(ValueError, match="no such class of instructions: flaot"):
        clocks(90, flaot=1)
