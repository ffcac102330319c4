"""Calls as vLLM takes them and what it answers, however it is reached."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from kv_agent.chunks import ChunkKey, TurnId
from kv_agent.engines.base import Call, Completion, Refused, Reuse
from kv_agent.errors import ConfigError
from kv_agent.vllm_plugin.signing import signed, signing_key

PLUGIN_KEY = "kv_agent"
CONNECTOR = "KVAgentConnector"


def prompt_of(call: Call) -> Any:
    """What vLLM takes as a prompt."""
    prompt: dict[str, Any] = {"prompt_token_ids": list(call.token_ids)}
    if call.cache_salt is not None:
        prompt["cache_salt"] = call.cache_salt
    return prompt


def sampling_of(call: Call) -> Any:
    """vLLM's ``SamplingParams``, with what is asked of the plugin."""
    from vllm import SamplingParams

    options = {PLUGIN_KEY: signed(call.options, signing_key())}
    extra = {"kv_transfer_params": options} if call.options else None
    return SamplingParams(
        max_tokens=call.max_tokens,
        temperature=call.temperature,
        ignore_eos=call.ignore_eos,
        logprobs=call.logprobs,
        extra_args=extra,
    )


def completion_of(output: Any, ttft_s: float) -> Completion:
    """vLLM's finished output as a value; raises :class:`ConfigError` with what the plugin refused."""
    generated = output.outputs[0]
    answer = (output.kv_transfer_params or {}).get(PLUGIN_KEY, {})
    if error := answer.get("error"):
        raise ConfigError(error)
    prompt_tokens = len(output.prompt_token_ids)
    local = output.num_cached_tokens or 0
    probe = answer.get("probe")
    turn_id = answer.get("turn_id")
    return Completion(
        text=generated.text,
        token_ids=tuple(generated.token_ids),
        reuse=parse_reuse(answer) if answer else Reuse(local=local, computed=prompt_tokens - local),
        turn_id=TurnId(turn_id) if turn_id else None,
        probe=base64.b64decode(probe) if probe else None,
        ttft_s=ttft_s,
        logprobs=tuple(
            {token: entry.logprob for token, entry in step.items()} for step in generated.logprobs or ()
        ),
    )


def parse_reuse(answer: Mapping[str, Any]) -> Reuse:
    """The plugin's answer fields as a value."""
    return Reuse(
        exact=answer["exact"],
        adapted=answer["adapted"],
        local=answer["local"],
        computed=answer["computed"],
        chunk_ids=tuple(ChunkKey(key) for key in answer["chunk_ids"]),
        refused=tuple(Refused(**refused) for refused in answer["refused"]),
    )
