"""Models come back from disk bit for bit; a folder is never believed further than its numbers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipelines.spectrogram_networks import Transformer, UNet
from pipelines.speech_models import CONFIG, WEIGHTS, Model, create, load, save
from pipelines.speech_networks import BandGainNetwork
from pipelines.speech_representations import BandGains, ComplexSpectrogram

GAINS = BandGains(8_000, bands=6, detail=2, lowest=-25.0)
SPECTROGRAM = ComplexSpectrogram(16_000, window=30, hop=8, centred=True)
MODELS = {
    "band_gains": Model(BandGainNetwork(GAINS.channels(), width=8, blocks=2, time_width=4), GAINS),
    "unet": Model(UNet(SPECTROGRAM.channels(), widths=(8, 16), time_width=4), SPECTROGRAM),
    "unet_over_gains": Model(UNet(GAINS.channels(), widths=(8,), time_width=4), GAINS),
    "transformer": Model(Transformer(SPECTROGRAM.channels(), (4, 2), 8, 1, 2, 4), SPECTROGRAM),
    "transformer_of_frames": Model(Transformer(GAINS.channels(), None, 8, 1, 2, 4), GAINS),
}
OWN = """
from pathlib import Path
from torch import nn
(Path(__file__).parent / "ran").touch()
class Net(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.factor = nn.Linear(channels[0], channels[2])
    def forward(self, x_t, t, noisy):
        return x_t * self.factor.weight[0, 0]
def wrong(channels):
    return 3
"""


def changed(folder: Path, part: str, **entries: object) -> Path:
    """A folder of band gains whose config has other entries in one part."""
    save(folder, *vars(MODELS["band_gains"]).values())
    config = json.loads((folder / CONFIG).read_text())
    config[part] |= entries
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_bit_for_bit(name, tmp_path):
    model = MODELS[name]
    save(tmp_path / "a" / "model", model.network, model.representation)
    loaded = load(tmp_path / "a" / "model")
    assert loaded.representation == model.representation
    assert type(loaded.network) is type(model.network)
    assert not loaded.network.training
    weights, expected = loaded.network.state_dict(), model.network.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    save(tmp_path / "b", loaded.network, loaded.representation)
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "a" / "model" / file).read_bytes()


def test_a_new_model_is_made_from_a_table_with_defaults():
    model = create(
        {"network": {"kind": "band_gains", "width": 8}, "representation": {"kind": "band_gains", "rate": 8000}}
    )
    assert model.representation == BandGains(8000)
    assert isinstance(model.network, BandGainNetwork)
    assert model.network.options == {"width": 8, "blocks": 6, "time_width": 64}


@pytest.mark.parametrize(
    ("part", "entries", "message"),
    [
        ("network", {"kind": "band_gain"}, r"unknown network.kind 'band_gain'; did you mean 'band_gains'\?"),
        ("network", {"widht": 3}, r"network.widht: unknown key; did you mean 'width'\?"),
        ("network", {"width": "8"}, "network.width: '8' arrived; expected an? (whole number|integer)"),
        ("network", {"channels": [1, 2, 3]}, "network.channels: unknown key"),
        ("network", {"kind": 3}, "network is .*; expected a table with a kind"),
        ("representation", {"kind": "gains"}, r"unknown representation.kind 'gains'; did you mean 'band_gains'\?"),
        ("representation", {"band": 3}, r"representation.band: unknown key; did you mean 'bands'\?"),
        ("representation", {"noise": -1.0}, "noise is -1.0 dB; expected a value above 0"),
    ],
)
def test_unknown_kinds_keys_and_values_are_refused_in_one_line(part, entries, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        load(changed(tmp_path, part, **entries))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / CONFIG) in str(caught.value)


def test_a_foreign_folder_that_names_code_is_refused_and_the_code_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN)
    expected = "network.kind 'mine.py:Net' names code, which a model's folder may not; if you trust it, name it yourself in policy.network"
    with pytest.raises(ValueError, match=expected):
        load(changed(tmp_path / "model", "network", kind="mine.py:Net"))
    assert not Path("ran").exists()


def test_a_network_that_the_user_names_is_saved_and_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN)
    own = create({"representation": {"kind": "band_gains", "bands": 6}}, "mine.py:Net")
    assert isinstance(own.network, nn.Module)
    save(tmp_path / "model", own.network, own.representation)
    loaded = load(tmp_path / "model", "mine.py:Net")
    assert torch.equal(loaded.network.state_dict()["factor.weight"], own.network.state_dict()["factor.weight"])
    with pytest.raises(ValueError, match="the weights belong to a network of your own; name it in policy.network"):
        load(tmp_path / "model")
    with pytest.raises(ValueError, match="policy.network: mine.py:wrong made a int; expected a torch module"):
        load(tmp_path / "model", "mine.py:wrong")


def test_weights_that_are_missing_broken_or_of_another_network_are_refused(tmp_path):
    folder = changed(tmp_path, "network", width=16)
    with pytest.raises(ValueError, match=f"{WEIGHTS} does not fit BandGainNetwork: .*enter.weight"):
        load(folder)
    save_file({"other": torch.zeros(1)}, folder / WEIGHTS)
    with pytest.raises(ValueError, match="does not fit BandGainNetwork"):
        load(folder)
    (folder / WEIGHTS).write_bytes(b"not weights")
    with pytest.raises(ValueError, match="is no safetensors file"):
        load(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"no {WEIGHTS}"):
        load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", r"\[\] arrived; expected a table with network and representation"),
        ("{}", "representation is None; expected a table with a kind"),
        ('{"networks": {}}', r"networks: unknown key; did you mean 'network'\?"),
    ],
)
def test_a_config_that_is_none_is_refused(text, message, tmp_path):
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"{CONFIG}: no such file"):
        load(tmp_path)
