"""Parameters of OpenAI's and others' interfaces that would change the answer and are not served: refused by name."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


class Neutral:
    """Marks a parameter that is not served: only null and `values`, which ask for nothing, are let through."""

    def __init__(self, *values: Any) -> None:
        """Keep the values."""
        self.values = (None, *values)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self.values)}

    def _check(self, value: Any) -> Any:
        # To Python, True is 1.
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.values):
            raise PydanticCustomError("unsupported_parameter", "is not supported by this server; leave it out")
        return value


Unserved = Annotated[Any, Neutral()]
UnservedFlag = Annotated[Any, Neutral(False)]
UnservedList = Annotated[Any, Neutral([])]
Accepted = Any
"""Of no effect on the answer."""


class Strict(BaseModel):
    """Types as JSON has them; names that are not declared are ignored."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", use_attribute_docstrings=True)


class UnservedParameters(Strict):
    """What both endpoints refuse, unless it asks for nothing."""

    # OpenAI's, and not served.
    audio: Unserved = None
    best_of: Annotated[Any, Neutral(1)] = None
    echo: UnservedFlag = None
    function_call: Annotated[Any, Neutral("none", "auto")] = None
    functions: UnservedList = None
    modalities: Annotated[Any, Neutral(["text"])] = None
    moderation: Unserved = None
    reasoning_effort: Annotated[Any, Neutral("none")] = None
    response_format: Annotated[Any, Neutral({"type": "text"})] = None
    suffix: Annotated[Any, Neutral("")] = None
    tool_choice: Annotated[Any, Neutral("none", "auto")] = None
    tools: UnservedList = None
    verbosity: Annotated[Any, Neutral("medium")] = None
    web_search_options: Unserved = None

    # vLLM's, and not served.
    add_generation_prompt: Annotated[Any, Neutral(True)] = None
    allowed_token_ids: Unserved = None
    bad_words: UnservedList = None
    chat_template: Unserved = None
    chat_template_kwargs: Annotated[Any, Neutral({})] = None
    continue_final_message: UnservedFlag = None
    guided_choice: Unserved = None
    guided_grammar: Unserved = None
    guided_json: Unserved = None
    guided_regex: Unserved = None
    include_stop_str_in_output: UnservedFlag = None
    length_penalty: Annotated[Any, Neutral(1)] = None
    logits_processors: UnservedList = None
    min_p: Annotated[Any, Neutral(0)] = None
    min_tokens: Annotated[Any, Neutral(0)] = None
    prompt_logprobs: Unserved = None
    repetition_penalty: Annotated[Any, Neutral(1)] = None
    skip_special_tokens: Annotated[Any, Neutral(True)] = None
    spaces_between_special_tokens: Annotated[Any, Neutral(True)] = None
    stop_token_ids: UnservedList = None
    structured_outputs: Unserved = None
    truncate_prompt_tokens: Unserved = None
    typical_p: Annotated[Any, Neutral(1)] = None
    use_beam_search: UnservedFlag = None

    # SGLang's and Text Generation Inference's, and not served.
    custom_logit_processor: Unserved = None
    custom_params: Unserved = None
    ebnf: Unserved = None
    grammar: Unserved = None
    json_schema: Unserved = None
    lora_path: Unserved = None
    no_stop_trim: UnservedFlag = None
    regex: Unserved = None
    return_full_text: UnservedFlag = None
    stop_regex: UnservedList = None
    structural_tag: Unserved = None
    top_n_tokens: Annotated[Any, Neutral(0)] = None
    truncate: Unserved = None
    watermark: UnservedFlag = None

    # transformers' GenerationConfig, and not served; `max_new_tokens` is taken for a misspelt `max_tokens`.
    bad_words_ids: UnservedList = None
    begin_suppress_tokens: UnservedList = None
    constraints: UnservedList = None
    diversity_penalty: Annotated[Any, Neutral(0)] = None
    do_sample: Annotated[Any, Neutral(True)] = None
    early_stopping: UnservedFlag = None
    encoder_no_repeat_ngram_size: Annotated[Any, Neutral(0)] = None
    encoder_repetition_penalty: Annotated[Any, Neutral(1)] = None
    epsilon_cutoff: Annotated[Any, Neutral(0)] = None
    eta_cutoff: Annotated[Any, Neutral(0)] = None
    exponential_decay_length_penalty: Unserved = None
    force_words_ids: UnservedList = None
    forced_bos_token_id: Unserved = None
    forced_eos_token_id: Unserved = None
    guidance_scale: Annotated[Any, Neutral(1)] = None
    max_length: Unserved = None
    max_time: Unserved = None
    min_length: Annotated[Any, Neutral(0)] = None
    min_new_tokens: Annotated[Any, Neutral(0)] = None
    no_repeat_ngram_size: Annotated[Any, Neutral(0)] = None
    num_beam_groups: Annotated[Any, Neutral(1)] = None
    num_beams: Annotated[Any, Neutral(1)] = None
    num_return_sequences: Annotated[Any, Neutral(1)] = None
    penalty_alpha: Annotated[Any, Neutral(0)] = None
    renormalize_logits: UnservedFlag = None
    sequence_bias: Unserved = None
    stop_strings: UnservedList = None
    suppress_tokens: UnservedList = None
    top_h: Unserved = None
