"""Speech enhancers on disk: a folder with `config.json`, which names shipped kinds and their options, and `model.safetensors`.

A folder never names code: a network of the user's own is named by the user, as "mine.py:Net", and called with the channels
of the representation.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mmgrpo.components import locate, options_of, typed
from mmgrpo.toml import nearest, refuse_unknown
from pipelines.mel import MelSpectrogram
from pipelines.spectrogram_networks import Transformer, UNet
from pipelines.speech_networks import BandGainNetwork
from pipelines.speech_representations import BandGains, ComplexSpectrogram, Representation

OWN = "own"  # kind of a network that the folder does not know
NETWORKS: dict[str, type] = {"band_gains": BandGainNetwork, "transformer": Transformer, "unet": UNet}
REPRESENTATIONS: dict[str, type] = {
    "band_gains": BandGains, "complex_spectrogram": ComplexSpectrogram, "mel": MelSpectrogram,
}  # fmt: skip
DECIDED = ("channels", "vocoder")  # arguments that a config does not hold: the one follows from it, the other is code
CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class Model:
    """A flow over speech."""

    network: nn.Module  # (x_t (B, C, K, T), t (B,), condition (B, Cc, K, T)) -> velocity (B, C, K, T)
    representation: Representation


def create(config: Mapping[str, Any], network: str | None = None, where: str = "model") -> Model:
    """A new model of `{"network": {"kind", options}, "representation": {"kind", options}}`; raises ValueError.

    `network`, the user's own "module:function" or "path/to/file.py:function", replaces the config's. `where` starts messages.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"{where}: {config!r} arrived; expected a table with network and representation")
    refuse_unknown(config, ("network", "representation"), where)
    representation: Representation = _made(config, "representation", REPRESENTATIONS, where)
    if network is not None:
        return Model(_own(network, representation), representation)
    return Model(_made(config, "network", NETWORKS, where, channels=representation.channels()), representation)


def load(folder: Path, network: str | None = None) -> Model:
    """The model of a folder, in evaluation mode on the CPU; raises ValueError in one line that names the file.

    `network` as in `create`, for folders whose weights belong to a network of the user's own.
    """
    config = _config(folder / CONFIG)
    model = create(config, network, str(folder / CONFIG))
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise ValueError(f"{folder}: no {WEIGHTS}; expected the weights of {CONFIG}")
    try:
        model.network.load_state_dict(load_file(weights))
    except SafetensorError as error:
        raise ValueError(f"{weights} is no safetensors file: {error}") from error
    except RuntimeError as error:  # torch lists every name and shape that differs, a line each
        reason = " ".join(str(error).split())
        raise ValueError(f"{weights} does not fit {type(model.network).__name__}: {reason[:300]}") from error
    model.network.eval()
    return model


def opened(model: str | None, new: Mapping[str, Any] | None, network: str | None) -> Model:
    """The model of a folder or a new one; raises ValueError unless exactly one of them is asked for."""
    if (model is None) == (new is None):
        raise ValueError(f"policy.model is {model!r} and policy.new is {new!r}; expected one of them")
    if model is not None:
        return load(Path(model), network)
    assert new is not None
    return create(new, network, "policy.new")


def save(folder: Path, network: nn.Module, representation: Representation) -> None:
    """Write the model's folder, which `load` reads back bit for bit; weights keep their dtype."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"network": _network_table(network), "representation": _representation_table(representation)}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, folder / WEIGHTS)


def _own(name: str, representation: Representation) -> nn.Module:
    network = locate(name, "policy.network")(representation.channels())
    if not isinstance(network, nn.Module):
        raise ValueError(f"policy.network: {name} made a {type(network).__name__}; expected a torch module")
    return network


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a folder written by mmgrpo")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return config


def _made(config: Mapping[str, Any], part: str, kinds: Mapping[str, type], where: str, **fixed: object) -> Any:
    """One part of a config, with what its options do not decide."""
    table = config.get(part)
    if not isinstance(table, Mapping) or not isinstance(table.get("kind"), str):
        known = ", ".join(sorted(kinds))
        raise ValueError(f"{where}: {part} is {table!r}; expected a table with a kind, one of {known}")
    kind = _known(table["kind"], part, kinds, where)
    parameters = {name: item for name, item in options_of(kinds[kind]).items() if name not in DECIDED}
    given = {key: value for key, value in table.items() if key != "kind"}
    refuse_unknown(given, parameters, f"{where}: {part}")
    options = {key: typed(value, parameters[key].annotation, f"{where}: {part}.{key}") for key, value in given.items()}
    try:
        return kinds[kind](**fixed, **options)
    except ValueError as error:  # sizes that contradict each other
        raise ValueError(f"{where}: {part}: {error}") from error


def _known(kind: str, part: str, kinds: Mapping[str, type], where: str) -> str:
    """The kind if it is a shipped one; raises ValueError otherwise."""
    if kind in kinds:
        return kind
    if part == "network" and kind == OWN:
        raise ValueError(f"{where}: the weights belong to a network of your own; name it in policy.network")
    if ":" in kind:
        trust = "if you trust it, name it yourself in policy.network"
        raise ValueError(f"{where}: {part}.kind {kind!r} names code, which a model's folder may not; {trust}")
    raise ValueError(f"{where}: unknown {part}.kind {kind!r}{nearest(kind, kinds)}")


def _network_table(network: nn.Module) -> dict[str, object]:
    for kind, shipped in NETWORKS.items():
        if isinstance(network, shipped):
            assert isinstance(network.options, dict)  # every shipped network keeps what it was made with
            return {"kind": kind, **network.options}
    return {"kind": OWN}


def _representation_table(representation: Representation) -> dict[str, object]:
    for kind, shipped in REPRESENTATIONS.items():
        if isinstance(representation, shipped):
            return {"kind": kind, **asdict(representation)}  # type: ignore[call-overload]
    known = ", ".join(sorted(REPRESENTATIONS))
    raise ValueError(f"representation is a {type(representation).__name__}; expected one of {known}")
