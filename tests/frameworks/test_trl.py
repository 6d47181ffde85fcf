"""TRL, PEFT, sentence-transformers and SetFit: one line, the callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from recipes import Watch, run_recipe, weights
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
)
from sentence_transformers import models as parts
from setfit import SetFitModel
from setfit import Trainer as SetFitTrainer
from setfit import TrainingArguments as SetFitArguments
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from autoclip.torch import QuantileClip
from autoclip.torch.transformers import AutoClipCallback

STEPS = 6
WORDS = [f"w{i}" for i in range(40)]
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
NAMES = {"autoclip/total_norm", "autoclip/clipped"}


def tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<unk>", "<eos>"]
    model = WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="<unk>")
    inner = Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    )


def sentence(seed: int, length: int = 6) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, length))


def model(folder: Path, kind: Any = LlamaForCausalLM, **settings: Any) -> Any:
    """From a folder, since DPO and PEFT look for where it came from."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=43,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=2,
        **settings,
    )
    kind(config).save_pretrained(folder / "llama")
    return kind.from_pretrained(folder / "llama", dtype=torch.float32)


def arguments(folder: Path, **settings: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_steps": STEPS // 2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": 3,
        **settings,
    }


def make_sft(folder: Path, callbacks: Any, peft_config: Any = None) -> Any:
    return SFTTrainer(
        model(folder),
        args=SFTConfig(**arguments(folder), max_length=16),
        train_dataset=Dataset.from_dict({"text": [sentence(i) for i in range(16)]}),
        processing_class=tokenizer(),
        peft_config=peft_config,
        callbacks=callbacks,
    )


def make_peft(folder: Path, callbacks: Any) -> Any:
    return make_sft(folder, callbacks, LORA)


def make_dpo(folder: Path, callbacks: Any) -> Any:
    columns = {
        name: [sentence(i + 100 * j) for i in range(16)]
        for j, name in enumerate(["prompt", "chosen", "rejected"])
    }
    return DPOTrainer(
        model(folder),
        args=DPOConfig(**arguments(folder), max_length=24),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


def make_reward(folder: Path, callbacks: Any) -> Any:
    columns = {
        name: [sentence(i + 100 * j) for i in range(16)]
        for j, name in enumerate(["chosen", "rejected"])
    }
    return RewardTrainer(
        model(folder, LlamaForSequenceClassification, num_labels=1),
        args=RewardConfig(**arguments(folder), max_length=24),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


def make_grpo(folder: Path, callbacks: Any) -> Any:
    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(set(completion.split()))) for completion in completions]

    settings = arguments(folder, per_device_train_batch_size=4)
    return GRPOTrainer(
        model(folder),
        reward_funcs=reward,
        args=GRPOConfig(**settings, num_generations=4, max_completion_length=5),
        train_dataset=Dataset.from_dict({"prompt": [sentence(i) for i in range(16)]}),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


def encoder(folder: Path) -> SentenceTransformer:
    torch.manual_seed(0)
    saved = folder / "bert"
    config = BertConfig(
        vocab_size=43,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(saved)
    tokenizer().save_pretrained(saved)
    word = parts.Transformer(str(saved), max_seq_length=16)
    return SentenceTransformer(modules=[word, parts.Pooling(16)], device="cpu")


def make_sentences(folder: Path, callbacks: Any) -> Any:
    model = encoder(folder)
    columns = {
        name: [sentence(i + 100 * j) for i in range(16)]
        for j, name in enumerate(["anchor", "positive"])
    }
    settings = arguments(folder)
    return SentenceTransformerTrainer(
        model,
        args=SentenceTransformerTrainingArguments(**settings),
        train_dataset=Dataset.from_dict(columns),
        loss=losses.MultipleNegativesRankingLoss(model),
        callbacks=callbacks,
    )


def make_with_class(folder: Path, callbacks: Any) -> Any:
    """The plain Trainer with a factory, without the callback."""
    tokens = tokenizer()
    rows = [tokens(sentence(i))["input_ids"] for i in range(16)]
    made = QuantileClip.optimizer_factory(torch.optim.AdamW, quantile=0.5)
    settings = arguments(folder, max_grad_norm=0)
    return Trainer(
        model(folder),
        TrainingArguments(**settings),
        train_dataset=[
            {"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in rows
        ],
        optimizer_cls_and_kwargs=(made, {"lr": 1e-2}),
    )


MAKES = {
    "sft": make_sft,
    "peft": make_peft,
    "dpo": make_dpo,
    "reward": make_reward,
    "grpo": make_grpo,
    "sentence_transformers": make_sentences,
    "optimizer_cls_and_kwargs": make_with_class,
}


def clipper_of(trainer: Any) -> Any:
    return trainer.optimizer.optimizer.clipper


def clipping() -> list[Any]:
    return [AutoClipCallback(quantile=0.5)]


def test_recipe(tmp_path: Path) -> None:
    given = {
        "model": model(tmp_path),
        "arguments": arguments(tmp_path),
        "dataset": Dataset.from_dict({"text": [sentence(i) for i in range(16)]}),
        "tokenizer": tokenizer(),
    }
    with Watch(quantile=0.9) as watch:
        trainer = run_recipe("trl", **given)["trainer"]
    assert watch.steps() == [STEPS]
    assert set(trainer.state.log_history[0]) >= NAMES


@pytest.mark.filterwarnings("ignore:.*max_grad_norm")
@pytest.mark.parametrize("name", MAKES)
def test_as_numpy_clips_and_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole = MAKES[name](tmp_path, clipping())
    with Watch(quantile=0.5) as watch:
        whole.train()
    assert watch.steps() == [STEPS]
    assert watch.clipped > 5
    if name != "optimizer_cls_and_kwargs":
        logged = [entry for entry in whole.state.log_history if "autoclip/total_norm" in entry]
        assert len(logged) == STEPS and set(logged[-1]) >= NAMES

    if name == "peft":
        trained = [p for p in whole.model.parameters() if p.requires_grad]
        assert 0 < len(trained) < len(list(whole.model.parameters()))
        assert len(clipper_of(whole).last.norms) == len(trained)

    checkpoint = tmp_path / f"checkpoint-{STEPS // 2}"
    other = MAKES[name](tmp_path, clipping())
    other.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(weights(other.model), weights(whole.model))
    assert clipper_of(other).state_dict() == clipper_of(whole).state_dict()


@pytest.mark.parametrize("is_first", [False, True])
def test_setfit_as_numpy_clips_and_logs(is_first: bool, tmp_path: Path) -> None:
    callback = AutoClipCallback(quantile=0.5, log_parameters="query")
    rows = {"text": [sentence(i) for i in range(8)], "label": [0, 1] * 4}
    trainer = SetFitTrainer(
        SetFitModel(model_body=encoder(tmp_path), model_head=LogisticRegression()),
        args=SetFitArguments(
            output_dir=str(tmp_path),
            batch_size=4,
            max_steps=STEPS,
            logging_steps=1,
            save_strategy="steps",
            save_steps=STEPS,
            report_to="none",
        ),
        train_dataset=Dataset.from_dict(rows),
        callbacks=[] if is_first else [callback],
    )
    if is_first:
        callback.add_to(trainer.st_trainer)
    with Watch(quantile=0.5) as watch, pytest.warns(UserWarning, match="max_grad_norm"):
        trainer.train()
    assert watch.steps() == [STEPS]
    assert watch.clipped > 5
    assert trainer.st_trainer.args.max_grad_norm == 1.0
    *logged, summary = trainer.st_trainer.state.log_history
    assert len(logged) == STEPS
    (clipper,) = (optimizer.clipper for optimizer in watch.norms)
    name = next(name for name in clipper.last.names if name.endswith("query.weight"))
    for step, entry in enumerate(logged):
        norms = next(iter(watch.norms.values()))[step]
        total = np.sqrt(np.nansum(norms**2))
        np.testing.assert_allclose(entry["autoclip/total_norm"], total, rtol=1e-5)
        assert entry.keys() >= NAMES | {f"autoclip/norm/{name}"}
    assert not summary.keys() & NAMES
    saved = torch.load(tmp_path / f"checkpoint-{STEPS}" / "optimizer.pt")
    assert saved["autoclip"] == clipper.state_dict()
