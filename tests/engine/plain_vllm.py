"""Answer one prompt with stock vLLM, no plugin: run as a script, told what to do on standard input."""

import json
import os
import sys


def main() -> None:
    request = json.load(sys.stdin)
    os.environ["VLLM_PLUGINS"] = ""
    from vllm import LLM, SamplingParams

    llm = LLM(model=request["model"], enforce_eager=True, **request["options"])
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=5)
    (output,) = llm.generate([{"prompt_token_ids": request["prompt"]}], params, use_tqdm=False)
    answer = output.outputs[0]
    result = {
        "token_ids": list(answer.token_ids),
        "logprobs": [{str(t): e.logprob for t, e in step.items()} for step in answer.logprobs],
    }
    with open(request["out"], "w") as file:
        json.dump(result, file)
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
