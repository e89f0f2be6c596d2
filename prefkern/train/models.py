"""Loading policy, reference and tokenizer; hashing weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ..integrations import hf
from . import model_files, noise, sharded_files
from .config import TrainConfig


def check_name(name: str) -> None:
    """Refuses a path without a folder behind it at once, where the hub would be asked five times.

    A name with one slash is a path where its first part is a folder here.
    """
    path = Path(name)
    if name and sharded_files.are_in(path):
        raise ValueError(
            f"{name} is a checkpoint in parts, which only --resume-from-checkpoint reads; pass the "
            "output folder of the finished run."
        )
    if name and path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise ValueError(f"{name} holds no config.json, so it is no model folder.")
        return
    if path.is_file():
        raise ValueError(f"{name} is a file; pass the model folder that from_pretrained reads.")
    first, _, rest = name.partition("/")
    local = not name or name.startswith(("/", ".", "~")) or "/" in rest or "\\" in name
    if local or (rest and Path(first).is_dir()):
        raise ValueError(f"there is no model folder {name!r} (here: {Path.cwd()}).")


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model folder or hub name.

    Raises:
        ValueError: there is none, or its files cannot be read.
    """
    from transformers import AutoTokenizer

    check_name(name)
    with told(name, "tokenizer"):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def load_processor(name: str) -> Any:
    """Tokenizer and image processor of a vision-language model, by folder or hub name.

    Raises:
        ValueError: it has no image processor, or none that marks the places of pictures in texts.
    """
    from transformers import AutoProcessor

    check_name(name)
    base = adapter_base(name) if is_adapter(name) else name
    with told(name, "processor"):
        processor = AutoProcessor.from_pretrained(base, trust_remote_code=False)
    if getattr(processor, "image_processor", None) is None:
        raise ValueError(
            f"{name} has no image processor (preprocessor_config.json, processor_config.json): "
            "image_column needs a vision-language model with its whole processor."
        )
    if not isinstance(getattr(processor, "image_token", None), str):
        raise ValueError(
            f"the processor of {name} ({type(processor).__name__}) names no image_token, by which "
            "a picture's place in a text is known; such models are not read here."
        )
    return processor


def auto_class(name: str, settings: Any, *, pictures: bool) -> Any:
    """The class of transformers that loads a model with this configuration.

    Raises:
        ValueError: the model reads texts alone where there are pictures, or the reverse.
    """
    import transformers

    readers = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    reads = type(settings) in readers
    if pictures and not reads:
        raise ValueError(
            f"{name} ({settings.model_type}) reads no pictures; drop image_column, or pass a "
            "vision-language model."
        )
    if not pictures and type(settings) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        if not reads:
            raise ValueError(
                f"{name} ({settings.model_type}) is no causal language model that transformers "
                "knows; pass one."
            )
        raise ValueError(
            f"{name} ({settings.model_type}) is a vision-language model, which `prefkern train` "
            "loads with --image-column, the name of the column of pictures."
        )
    return (
        transformers.AutoModelForImageTextToText if pictures else transformers.AutoModelForCausalLM
    )


@contextmanager
def told(name: str, what: str = "model") -> Iterator[None]:
    """Whatever a library raises while it reads a folder comes out as one line that names it."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if Path(name).is_dir():
            reason = model_files.fault(Path(name), what) or reason
        if "weights_only" in reason:  # of torch.load, whose advice is to run what the file holds
            reason = "its file of weights (.bin) is damaged, or holds more than tensors"
        raise ValueError(f"the {what} of {name} cannot be loaded: {reason}") from error


def load_whole(
    kind: Any | None,
    name: str,
    config: TrainConfig,
    tensor_parallel: int = 1,
    *,
    may_lack: Callable[[str], bool] = lambda key: False,
    **more: Any,
) -> hf.Model:
    """A transformers model of the auto class `kind`, every weight of it out of the checkpoint but
    those that it may lack; of its matrices a part where `tensor_parallel` processes share them;
    `more` goes to from_pretrained. None is the class of a language model, with pictures where
    `config` names their column.

    Raises:
        ValueError: weights are missing or of another shape (transformers would draw them at
            random), the model is an encoder-decoder, or its files cannot be read.
    """
    from transformers import AutoConfig

    check_name(name)
    options = {"dtype": getattr(torch, config.dtype), "trust_remote_code": False, **more}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    if tensor_parallel > 1:
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(tp_size=tensor_parallel)
    with told(name):
        settings = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if getattr(settings, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} ({settings.model_type}) is an encoder-decoder model; prefkern needs a decoder."
        )
    if kind is None:
        kind = auto_class(name, settings, pictures=config.image_column is not None)
    with told(name):
        model, found = kind.from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    lacking = sorted(found["missing_keys"])
    lacking += sorted(_mismatch(key) for key in found.get("mismatched_keys", ()))
    lacking = [key for key in lacking if not may_lack(key)]
    if lacking or found.get("error_msgs"):
        raise ValueError(_lacks(name, model, lacking, settings))
    own = {_any_layer(key) for key in model.state_dict()}
    if beyond := sorted(k for k in found.get("unexpected_keys", ()) if _any_layer(k) in own):
        raise ValueError(
            f"{name}: the checkpoint has {len(beyond)} weights of layers that config.json does not "
            f"count ({', '.join(beyond[:3])}{' ...' * (len(beyond) > 3)}); correct its number of "
            "layers."
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"{name} is an adapter; fetch it into a folder and pass the folder.")
    return model


def _lacks(name: str, model: hf.Model, lacking: list[str], settings: Any) -> str:
    """What to say of a checkpoint without these weights of the model."""
    what = ", ".join(lacking[:3]) + (" ..." if len(lacking) > 3 else "")
    kind = type(model).__name__
    saved = getattr(settings, "architectures", None) or [kind]
    if kind not in saved:
        return (
            f"{name} was saved as {saved[0]}, which lacks {len(lacking)} weights of a {kind} "
            f"({what}); they would be random. Pass a model of that kind."
        )
    return (
        f"{name}: {len(lacking)} weights of {kind} are not in the checkpoint, or have another "
        f"shape there ({what}); they would be random. Fetch or save the model again, or correct "
        "its config.json (tie_word_embeddings, number of layers)."
    )


def _mismatch(key: Any) -> str:
    """A weight of another shape, as transformers reports it: a name, or name and two shapes."""
    if isinstance(key, str):
        return key
    return f"{key[0]} {list(key[1])} where config.json says {list(key[2])}"


def _any_layer(key: str) -> str:
    """The name of a weight without the number of its layer."""
    return re.sub(r"\.\d+(?=\.)", ".N", key)


def loaded_whole() -> AbstractContextManager[None]:
    """In here every process reads models for itself. Where accelerate's FSDP loads in one process,
    the others' weights are empty until a model is sharded, and some models never are."""
    from accelerate.utils import patch_environment

    return patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false")


def load_causal_lm(name: str, config: TrainConfig, tensor_parallel: int = 1) -> hf.Model:
    """A transformers causal model with its weights in `config.dtype`, one that reads pictures
    where there is a column of them; raises as `load_whole`."""
    return load_whole(None, name, config, tensor_parallel)


def is_adapter(name: str | Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (Path(name) / "adapter_config.json").is_file()


def adapter_base(name: str | Path) -> str:
    """The model that an adapter folder names as its base."""
    from peft import PeftConfig

    with told(str(name), "adapter"):
        base = PeftConfig.from_pretrained(str(name)).base_model_name_or_path
    if not base:
        raise ValueError(f"{name}/adapter_config.json names no base model.")
    return str(base)


def read_settings(name: str) -> Any:
    """The text configuration of a model folder or hub name, without its weights."""
    from transformers import AutoConfig

    base = adapter_base(name) if is_adapter(name) else name
    with told(base):
        return AutoConfig.from_pretrained(base, trust_remote_code=False).get_text_config()


def load_model(
    name: str, config: TrainConfig, *, trainable: bool = False, tensor_parallel: int = 1
) -> hf.Model:
    """A model folder or hub name; with adapter_config.json in it, base plus PEFT adapter."""
    if not is_adapter(name):
        return load_causal_lm(name, config, tensor_parallel)
    from peft import PeftModel

    with _base_of(name):
        base = load_causal_lm(adapter_base(name), config, tensor_parallel)
    with told(name, "adapter"):
        model = PeftModel.from_pretrained(base, name, is_trainable=trainable)
        check_adapter(model, name)
    return model


@contextmanager
def _base_of(name: str) -> Iterator[None]:
    """Says of a base that cannot be loaded where its name comes from."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}/adapter_config.json names its base: {error}") from error


def check_adapter(model: Any, name: str, adapter: str = "default") -> None:
    """Refuses an adapter whose file lacks weights, which PEFT leaves as it drew them.

    Raises:
        ValueError: naming the file and the weights.
    """
    from peft import get_peft_model_state_dict

    wanted = get_peft_model_state_dict(model, adapter_name=adapter).keys()
    stored, pickled = (Path(name) / f"adapter_model.{end}" for end in ("safetensors", "bin"))
    if stored.is_file():
        with safe_open(stored, "pt") as file:
            there = set(file.keys())
    elif pickled.is_file():
        stored = pickled
        there = set(torch.load(pickled, map_location="cpu", weights_only=True))
    else:
        return  # of the hub
    if lacking := sorted(wanted - there):
        raise ValueError(f"{len(lacking)} weights are not in {stored} ({', '.join(lacking[:3])})")


def with_adapter(model: hf.Model, config: TrainConfig, task: str) -> hf.Model:
    """A model with a new LoRA adapter; whatever loading drew, it starts the same.

    Raises:
        ValueError: the model has none of lora_target_modules.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(config.seed)
    settings = LoraConfig(
        task_type=task, r=config.lora_r, lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_target_modules) or "all-linear",
    )  # fmt: skip
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        raise ValueError(f"lora_target_modules: {error}") from error


def load_policy(config: TrainConfig, checkpoint: Path | None, tensor_parallel: int = 1) -> hf.Model:
    """The model to train: fresh, with a new adapter if asked for, or as a checkpoint left it."""
    if checkpoint is not None and is_adapter(checkpoint):
        own = adapter_base(config.model) if is_adapter(config.model) else config.model
        if (named := adapter_base(checkpoint)) != own:
            raise ValueError(f"{checkpoint} holds an adapter of {named}, the run's model is {own}.")
    if checkpoint is not None and sharded_files.are_in(checkpoint):
        checkpoint = None  # its weights are read into the model once that is sharded
    source = str(checkpoint or config.model)
    if tensor_parallel > 1 and (config.lora_r or is_adapter(source)):
        raise ValueError(
            "tensor parallelism does not go with an adapter (PEFT adds whole outputs to parts); "
            "use FSDP, or train all weights."
        )
    model = load_model(source, config, trainable=True, tensor_parallel=tensor_parallel)
    if checkpoint is None and config.lora_r and is_adapter(source):
        given = model.peft_config[model.active_adapter].r
        if given != config.lora_r:
            raise ValueError(
                f"{source} is an adapter of rank {given}, which is trained on, and lora_r is "
                f"{config.lora_r}; drop --lora-r, or merge the adapter into its base first "
                "(merge_and_unload)."
            )
    if config.lora_r and not hasattr(model, "peft_config"):
        model = with_adapter(model, config, "CAUSAL_LM")
    if config.gradient_checkpointing:
        # non-reentrant: works with frozen embeddings and keeps DDP's hooks in order
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        enable = getattr(inner, "activation_checkpointing_enable", None)  # the name since 5.2x
        (enable or inner.gradient_checkpointing_enable)({"use_reentrant": False})
    if config.disable_dropout:
        noise.silence(model)
    return model.train()


def freeze(model: hf.Model) -> hf.Model:
    return model.requires_grad_(False).eval()


def weights_hash(model: nn.Module) -> str:
    """sha256 over names, types and bytes of all parameters and persistent buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def context_length(model: hf.Model) -> int | None:
    """Positions the model was built for, None where its config does not say."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def autocast(config: TrainConfig, device_type: str) -> torch.autocast:
    """The compute type of policy, reference and losses alike."""
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=config.bf16)
