"""A search over a few documents with LangChain. Needs langchain-core.

layertap-server &
python examples/search.py "where can one learn to swim?"
"""

from __future__ import annotations

import argparse

from langchain_core.vectorstores import InMemoryVectorStore

from layertap.integrations.langchain import LayertapEmbeddings

DOCUMENTS = [
    "The swimming pool offers courses for beginners on Mondays.",
    "The library is open until eight in the evening.",
    "The bakery sells bread and cakes from six in the morning.",
    "The choir rehearses in the old church every Thursday.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("target", nargs="?", help="the server; 127.0.0.1:50051 without it")
    arguments = parser.parse_args()
    store = InMemoryVectorStore.from_texts(DOCUMENTS, LayertapEmbeddings(arguments.target))
    for document, score in store.similarity_search_with_score(arguments.question, k=2):
        print(f"{score:.2f} {document.page_content}")


if __name__ == "__main__":
    main()
