"""Public question-answering sets by name: where each is found and how its columns become an example's plain JSON.

Knows nothing of files or downloads. Each adapter is written against the columns on the set's own card; a sequence of
objects arrives from `datasets` as an object of lists.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from training.answer_match import answer_words, contains, words

Record = dict[str, Any]
WINDOW_WORDS = 100  # DPR's passages (Karpukhin et al. 2020, sec. 4.1)
MAX_PER_DOCUMENT = 20


@dataclass(frozen=True, slots=True)
class PublicSet:
    """A set on the hub: its id, its configuration and the adapter of its records."""

    hub_id: str
    configuration: str | None
    adapt: Callable[[Record], Record]


def squad(record: Record) -> Record:
    """SQuAD (Rajpurkar et al. 2016): one paragraph, answers are spans of it."""
    positives = [{"title": record["title"].replace("_", " "), "text": record["context"]}]
    answers = list(dict.fromkeys(record["answers"]["text"]))
    return {"id": record["id"], "query": record["question"], "answers": answers, "positives": positives}


def nq_open(record: Record) -> Record:
    """Natural Questions, open-domain form (Lee et al. 2019): question and short answers, passages to be retrieved."""
    return {"query": record["question"], "answers": record["answer"]}


def natural_questions(record: Record) -> Record:
    """Natural Questions (Kwiatkowski et al. 2019): the long answer is the positive, its page gives the negatives."""
    tokens, candidates = record["document"]["tokens"], record["long_answer_candidates"]
    title = record["document"]["title"]

    def passage(start: int, end: int) -> Record:
        pairs = zip(tokens["token"][start:end], tokens["is_html"][start:end], strict=True)
        return {"title": title, "text": " ".join(token for token, is_html in pairs if not is_html)}

    annotations = record["annotations"]
    short = [text for item in annotations["short_answers"] for text in item["text"]]
    gold = {(item["start_token"], item["end_token"]) for item in annotations["long_answer"] if item["start_token"] >= 0}
    others = [
        (start, end)
        for start, end, top in zip(
            candidates["start_token"], candidates["end_token"], candidates["top_level"], strict=True
        )
        if top and not any(start < gold_end and gold_start < end for gold_start, gold_end in gold)
    ]
    negatives = [found for start, end in others if (found := passage(start, end))["text"]][:MAX_PER_DOCUMENT]
    return {
        "id": record["id"],
        "query": record["question"]["text"],
        "answers": list(dict.fromkeys(short)),
        "positives": [passage(start, end) for start, end in sorted(gold)],
        "negatives": negatives,
    }


def hotpot_qa(record: Record) -> Record:
    """HotpotQA (Yang et al. 2018), distractor setting: two supporting paragraphs of ten."""
    supporting = set(record["supporting_facts"]["title"])
    passages = [
        {"title": title, "text": "".join(sentences).strip(), "relevance": float(title in supporting)}
        for title, sentences in zip(record["context"]["title"], record["context"]["sentences"], strict=True)
    ]
    passages = [passage for passage in passages if passage["text"]]
    return {"id": record["id"], "query": record["question"], "answers": [record["answer"]], "passages": passages}


def ms_marco(record: Record) -> Record:
    """MS MARCO QnA (Bajaj et al. 2016): about ten retrieved passages, those the annotator used are the positives."""
    given = record["passages"]
    passages = [
        {"text": text, "relevance": float(selected)}
        for text, selected in zip(given["passage_text"], given["is_selected"], strict=True)
    ]
    answers = [answer for answer in record["answers"] if answer != "No Answer Present."]
    return {"id": str(record["query_id"]), "query": record["query"], "answers": answers, "passages": passages}


def trivia_qa(record: Record) -> Record:
    """TriviaQA (Joshi et al. 2017), `rc`: its pages in windows of 100 words; a window with the answer is a positive."""
    answer = record["answer"]
    answers = list(dict.fromkeys([answer["value"], *answer["aliases"]]))
    sought = answer_words(answers)
    pages = [
        *zip(record["entity_pages"]["title"], record["entity_pages"]["wiki_context"], strict=True),
        *zip(record["search_results"]["title"], record["search_results"]["search_context"], strict=True),
    ]
    positives: list[Record] = []
    negatives: list[Record] = []
    for title, text in pages:
        for window in word_windows(text):
            (positives if contains(words(window), sought) else negatives).append({"title": title, "text": window})
    return {
        "id": record["question_id"],
        "query": record["question"],
        "answers": answers,
        "positives": positives[:1],
        "negatives": negatives[:MAX_PER_DOCUMENT],
    }


def pisco(record: Record) -> Record:
    """PISCO's fine-tuning data (Louis et al. 2025): retrieved passages, best first, and Mistral-7B's answer."""
    return {"query": record["query"], "passages": record["docs"], "teacher_answer": record["mistral_label"]}


def word_windows(text: str) -> list[str]:
    """`text` in pieces of `WINDOW_WORDS` words; white space becomes single spaces."""
    split = text.split()
    return [" ".join(split[start : start + WINDOW_WORDS]) for start in range(0, len(split), WINDOW_WORDS)]


PUBLIC_SETS: dict[str, PublicSet] = {
    "squad": PublicSet("rajpurkar/squad", None, squad),
    "natural_questions": PublicSet("google-research-datasets/natural_questions", "default", natural_questions),
    "nq_open": PublicSet("google-research-datasets/nq_open", None, nq_open),
    "hotpot_qa": PublicSet("hotpotqa/hotpot_qa", "distractor", hotpot_qa),
    "ms_marco": PublicSet("microsoft/ms_marco", "v2.1", ms_marco),
    "trivia_qa": PublicSet("mandarjoshi/trivia_qa", "rc", trivia_qa),
    "maxoul/pisco_finetuning_data": PublicSet("maxoul/pisco_finetuning_data", None, pisco),
}
