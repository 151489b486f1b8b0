"""txssm serve: a real server on a port of this machine gives what generate() gives."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from megatron_txssm.cli.main import main
from megatron_txssm.data.tokenizer.huggingface import export_tokenizer
from megatron_txssm.data.tokenizer.sentencepiece import train_sentencepiece
from megatron_txssm.recipe.corpus.schema import TokenizerSource
from tests.hf.tiny import generate, tiny_model

PROMPT = "The state of a"


def test_a_server_completes_a_prompt(tmp_path: Path) -> None:
    texts = [line for line in Path(torch.__file__).with_name("functional.py").read_text().splitlines() if line.strip()]
    tokenizer = train_sentencepiece(texts, tmp_path / "tokenizer", 400)
    folder = tmp_path / "model"
    model = tiny_model(vocab_size=400)
    model.save_pretrained(folder)
    export_tokenizer(TokenizerSource(type="SentencePieceTokenizer", model=str(tokenizer)), folder, PROMPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "megatron_txssm.cli", "serve", str(folder), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as server:
        try:
            said = complete(port, {"model": str(folder), "prompt": PROMPT, "max_tokens": 8, "temperature": 0})
        finally:
            server.terminate()
    inputs = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")
    new = generate(model, inputs.input_ids, max_new_tokens=8)[0, inputs.input_ids.shape[1] :]
    assert said == AutoTokenizer.from_pretrained(folder).decode(new, skip_special_tokens=True)


def complete(port: int, request: dict[str, object]) -> str:
    """The text that the server adds, once it answers."""
    body = json.dumps(request).encode()
    until = time.monotonic() + 600
    while True:
        try:
            answer = urllib.request.urlopen(
                urllib.request.Request(
                    f"http://127.0.0.1:{port}/v1/completions", body, {"content-type": "application/json"}
                ),
                timeout=600,
            )
            return json.load(answer)["choices"][0]["text"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{error}; the server's output tells why") from None
        except urllib.error.URLError:
            if time.monotonic() > until:
                raise
            time.sleep(1)


def test_a_folder_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tmp_path)]) == 2
    assert "is no Hugging Face model; make one with `txssm convert export" in capsys.readouterr().err
