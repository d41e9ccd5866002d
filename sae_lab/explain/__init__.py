"""Explanations of features: written and scored, found by experiment, asked of the model itself, read off its lens.

    scores = sl.explain.explain(index, 40)          # rules, no network; or any explainer, a function of str to str
    sl.explain.sage_explain(sae, lm, index, 812, agent=sl.explain.ScriptedAgent())
"""

from sae_lab.explain.asking import Asker, local_chat, openai_compatible
from sae_lab.explain.contexts import Corpus, Passage, Passages
from sae_lab.explain.explainers import Condition, Rule, RuleExplainer
from sae_lab.explain.lens import LensShape, lens_shape, token_features
from sae_lab.explain.prompts import EvolvedPrompts, evolve_prompts
from sae_lab.explain.running import ExplainedFeatures, ScoredExplanation, explain
from sae_lab.explain.sage import Hypothesis, Sage, Trial, sage_explain
from sae_lab.explain.scoring import Explanation, Score, score
from sae_lab.explain.scripted import ScriptedAgent
from sae_lab.explain.selfexplain import Implant, SelfExplanations, self_explain
from sae_lab.explain.token_lists import TokenLists, token_list
from sae_lab.explain.trees import DefinitionTree, definition_tree
from sae_lab.spelling import no_attribute

__all__ = [
    "Asker", "Condition", "Corpus", "DefinitionTree", "EvolvedPrompts", "ExplainedFeatures", "Explanation",
    "Hypothesis", "Implant", "LensShape", "Passage", "Passages", "Rule", "RuleExplainer", "Sage", "Score",
    "ScoredExplanation", "ScriptedAgent", "SelfExplanations", "TokenLists", "Trial", "definition_tree",
    "evolve_prompts", "explain", "lens_shape", "local_chat", "openai_compatible", "sage_explain", "score",
    "self_explain", "token_features", "token_list",
]  # fmt: skip

__getattr__ = no_attribute(__name__, __all__)
