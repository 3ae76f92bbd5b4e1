"""The golden model of VideoReward, for tests.

Its files are in $STREAMR1_GOLDEN (default tests/golden) or in its folder videoreward.
"""

import json
import os
import re
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLModel

from streamr1_ref.reward import AXES
from streamr1_ref.utils.files import load_tensors
from streamr1_ref.wan.video_reward import VideoReward

ROOT = Path(os.environ.get("STREAMR1_GOLDEN") or Path(__file__).parent / "golden")


def find(file: str) -> Path:
    """Path of a golden file; FileNotFoundError says where it was looked for."""
    for path in (ROOT / "videoreward" / file, ROOT / file):
        if path.is_file():
            return path
    raise FileNotFoundError(f"expected {file} in {ROOT} or {ROOT / 'videoreward'}")


def names(kind: str) -> list[str]:
    """Which files NAME.safetensors fit the pattern `kind`.

    Never none, so that no test passes for want of files.
    """
    here = {p.stem for place in (ROOT / "videoreward", ROOT) for p in place.glob("*.safetensors")}
    return sorted(n for n in here if re.fullmatch(kind, n)) or [f"missing {kind}"]


def load(name: str) -> tuple[dict, dict]:
    settings = json.loads(find(f"{name}.json").read_text())
    return load_tensors(find(f"{name}.safetensors"))[0], settings


def wording() -> str:
    return "{video}" + load("model")[1]["template"]


def scales() -> tuple[list[float], list[float]]:
    values = load("model")[1]["normalisation"]
    return tuple([values[f"{axis}_{kind}"] for axis in AXES] for kind in ("mean", "std"))


def tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_file=str(find("tokenizer.json")), unk_token="<unk>")
    made.chat_template = load("model")[1]["chat_template"] if chat else None
    return made


def config() -> Qwen2VLConfig:
    info = load("model")[1]
    text = {
        k: v
        for k, v in info["config"].items()
        if k not in ("vision_config", "mrope_section", "rope_theta")
    }
    rope = {
        "rope_type": "default",
        "mrope_section": info["config"]["mrope_section"],
        "rope_theta": info["config"]["rope_theta"],
    }
    ids = {
        f"{name}_token_id": info["token_ids"][f"<|{token}|>"]
        for name, token in (
            ("video", "video_pad"),
            ("image", "image_pad"),
            ("vision_start", "vision_start"),
        )
    }
    text |= {"rope_parameters": rope, "bos_token_id": 0, "eos_token_id": 1}
    return Qwen2VLConfig(text_config=text, vision_config=info["config"]["vision_config"], **ids)


def network() -> tuple[Qwen2VLModel, nn.Linear]:
    weights = {
        re.sub(r"^w\.(model\.)?", lambda m: "language_model." if m[1] else "", n): t
        for n, t in load("model")[0].items()
    }
    model, head = (
        Qwen2VLModel(config()).eval(),
        nn.Linear(config().text_config.hidden_size, 3, bias=False),
    )
    head.load_state_dict({"weight": weights.pop("rm_head.weight")})
    model.load_state_dict(weights)
    return model.requires_grad_(False), head.requires_grad_(False)


def reward(
    kind: type = VideoReward, template: str | None = None, chat: bool = True, **settings
) -> VideoReward:
    """The golden reward model, `kind` being VideoReward or a class of it."""
    model, head = network()
    size = tuple(load("model")[1]["size"])
    made = kind(model, head, tokenizer(chat), template or wording(), *scales(), size, **settings)
    return made.eval().requires_grad_(False)


def raw(model: VideoReward, scores: dict) -> torch.Tensor:
    """Raw scores [B,3] of normalised ones by axis."""
    return torch.stack([scores[axis] for axis in AXES], 1) * model.std + model.mean
