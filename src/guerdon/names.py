"""The names that ship with Guerdon, by kind of part: what a configuration may say, and where it lives.

Strings only: nothing is imported before a name is used, so names of a higher floor may stand here. Keep each table
sorted. What a value must be is said at the registries in :mod:`guerdon.parts`.
"""

from __future__ import annotations

__all__ = ["CREDIT", "ENVIRONMENT", "OBJECTIVE", "REWARD", "SANDBOX", "SHAPE"]

ENVIRONMENT: dict[str, str] = {
    "single_turn": "guerdon.environments.single:SingleTurn",
}

REWARD: dict[str, str] = {
    "bleu": "guerdon.rewards:Bleu",
    "bmas": "guerdon.reward_models:bmas",
    "box_iou": "guerdon.rewards:BoxIoU",
    "boxed_format": "guerdon.rewards:BoxedFormat",
    "boxed_match": "guerdon.rewards:BoxedMatch",
    "call_cost": "guerdon.rewards:CallCost",
    "choice_match": "guerdon.rewards:ChoiceMatch",
    "chrf": "guerdon.rewards:ChrF",
    "citations": "guerdon.rewards:Citations",
    "code_tests": "guerdon.rewards:CodeTests",
    "embedding_similarity": "guerdon.reward_models:embedding_similarity",
    "exact_match": "guerdon.rewards:ExactMatch",
    "fkgl": "guerdon.rewards:FKGLReward",
    "format_length": "guerdon.rewards:format_length",
    "grounding": "guerdon.rewards:Grounding",
    "hump_length": "guerdon.rewards:HumpLength",
    "json_schema": "guerdon.rewards:JSONSchema",
    "judge": "guerdon.reward_models.named:judge",
    "language_match": "guerdon.rewards:LanguageMatch",
    "length_incentive": "guerdon.rewards:LengthIncentive",
    "linear_length": "guerdon.rewards:LinearLength",
    "math_equality": "guerdon.rewards:MathEquality",
    "overlong_penalty": "guerdon.rewards:OverlongPenalty",
    "phrase_reward": "guerdon.rewards:PhraseReward",
    "preservation_gate": "guerdon.rewards:PreservationGate",
    "quantity": "guerdon.rewards:Quantity",
    "reasoning_sql": "guerdon.rewards:reasoning_sql",
    "regex_match": "guerdon.rewards:RegexMatch",
    "regularized_relevance": "guerdon.reward_models:regularized_relevance",
    "relaxed_number": "guerdon.rewards:RelaxedNumber",
    "repetition_ratio": "guerdon.rewards:RepetitionRatio",
    "rouge": "guerdon.rewards:Rouge",
    "router_format": "guerdon.rewards:RouterFormat",
    "script_share": "guerdon.rewards:ScriptShare",
    "sentiment": "guerdon.rewards:Sentiment",
    "sql_clauses": "guerdon.rewards:ClauseMatch",
    "sql_execution": "guerdon.rewards:ExecutionMatch",
    "sql_format": "guerdon.rewards:SQLFormat",
    "sql_ngrams": "guerdon.rewards:NgramOverlap",
    "sql_schema": "guerdon.rewards:SchemaOverlap",
    "sql_syntax": "guerdon.rewards:SQLSyntax",
    "tag_format": "guerdon.rewards:TagFormat",
    "target_length": "guerdon.rewards:TargetLength",
    "think_answer_format": "guerdon.rewards:ThinkAnswerFormat",
    "token_f1": "guerdon.rewards:TokenF1",
    "toolrl": "guerdon.rewards:toolrl",
    "toxicity": "guerdon.rewards:Toxicity",
    "trigram_uniqueness": "guerdon.rewards:TrigramUniqueness",
    "typed_outcome": "guerdon.rewards:TypedOutcome",
    "zipf_simplicity": "guerdon.rewards:ZipfSimplicity",
}

SANDBOX: dict[str, str] = {
    "docker": "guerdon.sandbox:DockerSandbox",
    "local": "guerdon.sandbox:LocalSandbox",
}

SHAPE: dict[str, str] = {
    "affine": "guerdon.shaping:affine",
    "clip": "guerdon.shaping:clip",
    "flip_scores": "guerdon.shaping:FlipScores",
    "overlong": "guerdon.training.shapes:Overlong",
    "par": "guerdon.shaping:par",
    "quantile_rescale": "guerdon.shaping:quantile_rescale",
    "shaped": "guerdon.shaping:shaped",
}

CREDIT: dict[str, str] = {
    "gae": "guerdon.training.rules.critic:Gae",
    "group_relative": "guerdon.training.rules.outcome:GroupRelative",
    "leave_one_out": "guerdon.training.rules.outcome:LeaveOneOut",
    "min_form": "guerdon.training.rules.minform:MinFormCredit",
    "pav": "guerdon.training.rules.progress_weight:PavCredit",
    "per_channel": "guerdon.training.rules.outcome:PerChannel",
    "process_relative": "guerdon.training.rules.stepwise:ProcessRelative",
    "progress": "guerdon.training.rules.progress:ProgressCredit",
    "reinforce": "guerdon.training.rules.outcome:Reinforce",
    "reinforce_plus_plus": "guerdon.training.rules.stepwise:ReinforcePlusPlus",
    "returns_relative": "guerdon.training.rules.process:ReturnsRelative",
    "step_leave_one_out": "guerdon.training.rules.stepwise:StepLeaveOneOut",
    "sum_form": "guerdon.training.rules.minform:SumCredit",
    "termination_relative": "guerdon.training.rules.termination:TerminationRelative",
    "token_returns": "guerdon.training.rules.stepwise:TokenReturns",
}

OBJECTIVE: dict[str, str] = {
    "cispo": "guerdon.objectives:cispo",
    "gspo": "guerdon.objectives:gspo",
    "ppo_clip": "guerdon.objectives:ppo_clip",
    "reinforce": "guerdon.objectives:reinforce",
}
