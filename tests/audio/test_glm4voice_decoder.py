"""Flow model and vocoder against the recorded numbers, and their guarantees."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vita_audio.audio.glm4voice import FlowDecoder, Vocoder
from vita_audio.audio.glm4voice.config import FlowConfig, VocoderConfig
from vita_audio.audio.glm4voice.estimator import MaskedGroupNorm
from vita_audio.audio.glm4voice.flow import ROWS_PER_PASS, FlowInput, nearest_indices, solver_times

GOLDENS = Path(__file__).parents[1] / "goldens" / "glm4voice"
RECORDED = np.load(GOLDENS / "decoder" / "expected.npz")
EXPECTED = json.loads((GOLDENS / "decoder" / "expected.json").read_text())
INJECTED = np.load(GOLDENS / "decoder" / "inject.npz")


@pytest.fixture(scope="module")
def flow() -> FlowDecoder:
    return FlowDecoder.from_pretrained(GOLDENS / "decoder")


@pytest.fixture(scope="module")
def vocoder() -> Vocoder:
    return Vocoder.from_pretrained(GOLDENS / "decoder")


def _recorded(name: str) -> torch.Tensor:
    return torch.from_numpy(RECORDED[name])


def _close(actual: torch.Tensor, name: str, atol: float) -> None:
    np.testing.assert_allclose(actual.numpy(), RECORDED[name], atol=atol, rtol=0)


def _draws(samples: int) -> dict[str, torch.Tensor]:
    table = torch.from_numpy(INJECTED["noise_table"]).float() / 32
    noise = table[:, torch.arange(samples) % table.shape[1]][None]
    return {"phase": torch.from_numpy(INJECTED["phase"]), "noise": noise}


def test_encoded_codes_equal_the_recorded_ones(flow):
    tokens = torch.tensor([EXPECTED["offline_tokens"]])
    embedded = flow.input_embedding(tokens)
    states = flow.encoder.hidden_states(embedded)
    _close(states[0], "offline/enc_embed", 1e-4)
    _close(states[1], "offline/enc_layer0", 1e-4)
    _close(flow.encoder(embedded), "offline/h", 1e-4)
    _close(flow.encode(tokens), "offline/h_proj", 1e-4)
    mu, mask = flow.condition([tokens[0]])
    assert mask is None
    _close(mu.transpose(1, 2), "offline/mu", 1e-4)


def test_negative_codes_count_as_zero(flow):
    assert torch.equal(flow.encode(torch.tensor([[-1, 5]])), flow.encode(torch.tensor([[0, 5]])))


def test_mel_frame_counts_equal_the_recorded_ones(flow):
    assert {int(n): flow.frames(int(n)) for n in EXPECTED["token_len_to_frames"]} == {
        int(n): frames for n, frames in EXPECTED["token_len_to_frames"].items()
    }


def test_velocities_equal_the_recorded_ones(flow):
    mu, z = _recorded("offline/mu").transpose(1, 2), _recorded("offline/z")
    speaker = flow.spk_embed_affine_layer(torch.zeros(1, 192))
    nothing, start = torch.zeros_like(mu), torch.tensor(0.0)
    _close(flow.estimator(z, mu, start, speaker, nothing), "offline/est_first_cond", 5e-4)
    _close(flow.estimator(z, nothing, start, 0 * speaker, nothing), "offline/est_first_uncond", 5e-4)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_mel_equals_the_recorded_one(flow, steps):
    tokens = torch.tensor([EXPECTED["offline_tokens"]])
    _close(flow(tokens, steps=steps, z=_recorded("offline/z")), f"offline/mel_steps{steps}", 5e-4)


def test_default_noise_is_that_of_the_reference(flow):
    tokens = torch.tensor([EXPECTED["offline_tokens"]])
    assert torch.equal(flow(tokens, steps=1), flow(tokens, steps=1, z=_recorded("offline/z")))


def test_a_speaker_embedding_steers_the_mel_as_recorded(flow):
    tokens = torch.tensor([EXPECTED["small_tokens"]])
    embedding = _recorded("small/embedding")
    mel = flow(tokens, embedding=embedding, steps=5)
    _close(mel, "small/mel_steps5", 5e-4)
    assert torch.allclose(mel, flow(tokens, embedding=3 * embedding, steps=5), atol=1e-5)
    assert not torch.allclose(mel, flow(tokens, steps=5), atol=1e-2)


def test_solver_times_are_the_recorded_ones():
    np.testing.assert_allclose(solver_times(10)[:-1].numpy(), RECORDED["offline/est_t_values"], atol=1e-6)


def test_zero_solver_steps_are_refused(flow):
    with pytest.raises(ValueError, match="steps"):
        flow(torch.tensor([[1, 2, 3]]), steps=0)


def test_rows_of_a_ragged_batch_do_not_see_each_other(flow):
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for count, known in ((23, 40), (7, 0), (12, 11)):
        frames = flow.frames(count)
        inputs.append(
            FlowInput(
                torch.randint(0, 256, (count,), generator=generator),
                nearest_indices(count, frames),
                torch.randn(80, frames, generator=generator),
                torch.randn(80, known, generator=generator),
            )
        )
    together = flow.generate(inputs, steps=3)
    for row, mel in zip(inputs, together, strict=True):
        assert mel.shape == (80, row.frames - row.prompt_mel.shape[1])
        torch.testing.assert_close(mel, flow.generate([row], steps=3)[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("frames", [55, 128, 201])
def test_a_row_of_a_shared_pass_is_the_same_bit_for_bit_in_any_company(flow, frames):
    generator = torch.Generator().manual_seed(0)

    def row(length: int) -> FlowInput:
        codes = max(1, round(length / 6.9))
        return FlowInput(
            torch.randint(0, 256, (codes,), generator=generator),
            nearest_indices(codes, length),
            torch.randn(80, length, generator=generator),
            torch.randn(80, length // 3, generator=generator),
        )

    own, others, padded = row(frames), [row(length) for length in (30, 256, frames)], 256
    alone = flow.solve_rows([own] * ROWS_PER_PASS, 2, padded)[0]
    torch.testing.assert_close(alone, flow.generate([own], steps=2)[0], atol=2e-5, rtol=0)
    for place in range(ROWS_PER_PASS):
        company = [*others[:place], own, *others[place:]]
        assert torch.equal(flow.solve_rows(company, 2, padded)[place], alone)


def test_a_device_other_than_the_cpu_solves_in_passes_of_one_shape(flow, monkeypatch):
    """Rows of a bucket share passes; the last pass repeats a row to keep the shape."""
    passes = []
    solve = FlowDecoder.solve_rows

    def recording(self, inputs, steps, padded_frames=None):
        passes.append((len(inputs), padded_frames))
        return solve(self, inputs, steps, padded_frames)

    rows = [
        FlowInput(
            torch.full((codes,), codes),
            nearest_indices(codes, flow.frames(codes)),
            torch.randn(80, flow.frames(codes), generator=torch.Generator().manual_seed(codes)),
            torch.zeros(80, 0),
        )
        for codes in (8, 30, 9, 10, 11, 12, 31)
    ]
    expected = flow.generate(rows, steps=1)
    monkeypatch.setattr(FlowDecoder, "solve_rows", recording)
    monkeypatch.setattr(FlowDecoder, "shares_passes", True)
    solved = flow.generate(rows, steps=1)
    assert passes == [(ROWS_PER_PASS, 128), (ROWS_PER_PASS, 128), (ROWS_PER_PASS, 256)]
    flow(torch.tensor([8] * 8), steps=1)  # a whole reply has no company, and is not padded
    assert passes[3:] == [(1, None)]
    for mel, wanted in zip(solved, expected, strict=True):
        torch.testing.assert_close(mel, wanted, atol=2e-5, rtol=0)


@given(frames=st.integers(1, 40), real=st.integers(1, 40), groups=st.sampled_from([1, 4, 8]))
@settings(max_examples=25, deadline=None)
def test_masked_group_norm_is_group_norm_of_the_real_frames(frames, real, groups):
    real = min(real, frames)
    x = torch.randn(2, 8, frames, generator=torch.Generator().manual_seed(frames))
    norm = MaskedGroupNorm(groups, 8)
    mask = (torch.arange(frames) < real).float().expand(2, 1, frames)
    with torch.no_grad():
        torch.testing.assert_close(
            norm(x, mask)[:, :, :real], F.group_norm(x[:, :, :real], groups), atol=1e-4, rtol=1e-4
        )


@given(tokens=st.integers(1, 800))
@settings(max_examples=50, deadline=None)
def test_nearest_indices_equal_those_of_pytorch(tokens):
    frames = max(1, 441 * tokens // 64)
    row = torch.arange(tokens, dtype=torch.float32)[None, None]
    expected = F.interpolate(row, size=frames, mode="nearest")[0, 0]
    assert torch.equal(nearest_indices(tokens, frames), expected.long())


def test_vocoder_stages_equal_the_recorded_ones(vocoder):
    mel = _recorded("offline/mel_steps10")
    samples = mel.shape[2] * 256
    f0 = vocoder.f0_predictor(mel)
    _close(f0, "offline/f0", 1e-2)
    _close(vocoder.source(_recorded("offline/f0"), **_draws(samples)), "offline/source", 1e-5)
    _close(vocoder.source(f0, **_draws(samples)), "offline/source", 5e-4)
    _close(vocoder.conv_pre(mel)[:, :, :8], "offline/conv_pre_first8", 1e-3)


def test_waveform_equals_the_recorded_one(vocoder):
    mel = _recorded("offline/mel_steps10")
    _close(vocoder.decode(mel, _recorded("offline/source")), "offline/wave_steps10", 1e-4)
    wave, _ = vocoder(mel, **_draws(mel.shape[2] * 256))
    _close(wave, "offline/wave_steps10", 5e-3)


def test_one_seeded_generator_reproduces_the_reference_chain(flow, vocoder):
    generator = torch.Generator().manual_seed(42)
    mel = flow(torch.tensor([EXPECTED["offline_tokens"]]), steps=1, generator=generator)
    wave, _ = vocoder(mel, generator=generator)
    _close(wave[:, :4096], "offline/native_rng_cpu_wave_steps1_head", 1e-2)


def test_injected_draws_end_to_end(flow, vocoder):
    mel = flow(torch.tensor([EXPECTED["offline_tokens"]]), steps=1, z=_recorded("offline/z"))
    wave, _ = vocoder(mel, **_draws(mel.shape[2] * 256))
    _close(wave[:, :4096], "offline/wave_steps1_head", 1e-2)


def test_a_cached_source_overwrites_the_start(vocoder):
    mel = _recorded("offline/mel_steps10")
    cached = torch.full((1, 1, 256), 0.25)
    draws = _draws(mel.shape[2] * 256)
    wave, source = vocoder(mel, cached, **draws)
    _, plain = vocoder(mel, **draws)
    assert torch.equal(source[:, :, :256], cached)
    assert torch.equal(source[:, :, 256:], plain[:, :, 256:])
    assert torch.equal(wave, vocoder.decode(mel, source))


def test_folding_the_weight_norm_changes_no_sample(vocoder):
    unfolded = Vocoder(vocoder.config)
    state = torch.load(GOLDENS / "decoder" / "hift.pt", weights_only=True)
    unfolded.load_state_dict(state)
    mel, source = _recorded("offline/mel_steps10"), _recorded("offline/source")
    torch.testing.assert_close(unfolded.decode(mel, source), vocoder.decode(mel, source), atol=1e-5, rtol=0)
    assert not any("weight_g" in key for key in vocoder.state_dict())


def test_pt_and_safetensors_hold_the_same_model(tmp_path, flow):
    for name in ("config_plain.yaml", "flow.pt"):
        (tmp_path / name).write_bytes((GOLDENS / "decoder" / name).read_bytes())
    other = FlowDecoder.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, other[key]) for key, value in flow.state_dict().items())


def test_loaded_models_are_frozen(flow, vocoder):
    for model in (flow, vocoder):
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "build"),
    [("flow", lambda: FlowDecoder(FlowConfig())), ("hift", lambda: Vocoder(VocoderConfig()))],
)
def test_an_instance_of_released_sizes_has_the_released_keys_and_shapes(name, build):
    manifest = json.loads((GOLDENS / f"manifest_{name}.json").read_text())["tensors"]
    with torch.device("meta"):
        shapes = {key: list(value.shape) for key, value in build().state_dict().items()}
    assert shapes == {key: entry["shape"] for key, entry in manifest.items()}
