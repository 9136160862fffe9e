"""The cases of the MCTP goldens as requests to the engine."""

from typing import Any

from vita_audio.engine import Request, Sampling


def golden_request(case: dict[str, Any]) -> Request:
    """A case of ``generation_expected.json``."""
    return Request(
        case["prompt"],
        case["mtp_inference_mode"],
        Sampling(repetition_penalty=case["repetition_penalty"]),
        max_new_tokens=case["max_new_tokens"],
        stop_tokens=[] if case["eos_token_id"] is None else [case["eos_token_id"]],
    )
