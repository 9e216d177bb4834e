"""The names that ship with Guerdon, by kind of part: what a configuration may say, and where it lives.

Strings only: nothing is imported before a name is used, so names of a higher floor may stand here. Keep each table
sorted. What a value must be is said at the registries in :mod:`guerdon.parts`.
"""

from __future__ import annotations

__all__ = ["CREDIT", "ENVIRONMENT", "OBJECTIVE", "REWARD", "SHAPE"]

ENVIRONMENT: dict[str, str] = {
    "single_turn": "guerdon.environments.single:SingleTurn",
}

REWARD: dict[str, str] = {
    "box_iou": "guerdon.rewards:BoxIoU",
    "boxed_format": "guerdon.rewards:BoxedFormat",
    "boxed_match": "guerdon.rewards:BoxedMatch",
    "call_cost": "guerdon.rewards:CallCost",
    "choice_match": "guerdon.rewards:ChoiceMatch",
    "code_tests": "guerdon.rewards:CodeTests",
    "exact_match": "guerdon.rewards:ExactMatch",
    "fkgl": "guerdon.rewards:FKGLReward",
    "format_length": "guerdon.rewards:format_length",
    "hump_length": "guerdon.rewards:HumpLength",
    "length_incentive": "guerdon.rewards:LengthIncentive",
    "linear_length": "guerdon.rewards:LinearLength",
    "overlong_penalty": "guerdon.rewards:OverlongPenalty",
    "phrase_reward": "guerdon.rewards:PhraseReward",
    "preservation_gate": "guerdon.rewards:PreservationGate",
    "reasoning_sql": "guerdon.rewards:reasoning_sql",
    "relaxed_number": "guerdon.rewards:RelaxedNumber",
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
    "trigram_uniqueness": "guerdon.rewards:TrigramUniqueness",
    "typed_outcome": "guerdon.rewards:TypedOutcome",
    "zipf_simplicity": "guerdon.rewards:ZipfSimplicity",
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
