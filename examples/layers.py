# %% [markdown]
# # Every layer of a BERT, in numpy
#
# The two halves of the classic notebook on BERT embeddings, without a model in this process: a `layertap-server` holds
# it and hands out what is asked for. Start one beside this notebook (`make serve` in a checkout, or
# `layertap-server --model-id bert-base-uncased`), and run the cells.
#
# 1. **Tokens**: `[CLS]`, `[SEP]`, `[PAD]`, ids and the attention mask.
# 2. **Embeddings**: the last hidden state, the pooler output, all hidden states.
# 3. **Pictures**: how each token changes from layer to layer, how alike the tokens of a sentence are, how one word
#    parts ways in two contexts, and where each token looks.
# 4. **A long document**: more tokens than the model has positions, and a vector for each of its sentences.

# %%
import os

import numpy as np

from layertap import Client, TokenIds, Windows, analysis, plot

client = Client(os.environ.get("LAYERTAP_TARGET", "127.0.0.1:50051"))
info = client.model_info()
print(f"{info.model_id}: layers 0 to {info.layer_count}, {info.hidden_size} wide, up to {info.max_length} tokens")

# %% [markdown]
# ## 1. Tokens
#
# The server tokenizes as the model was trained: it adds `[CLS]` in front and `[SEP]` at the end. `pad_to` appends
# `[PAD]` until there are so many tokens; the attention mask is 1 for what the model is to look at and 0 for padding.

# %%
tokens = client.tokenize("I love Paris", pad_to=7)
tokens

# %%
print("tokens        ", tokens.tokens[0])
print("input_ids     ", tokens.input_ids[0])
print("attention_mask", tokens.attention_mask[0])

# %% [markdown]
# Ids can be turned back into text, and put together by hand: they are then computed exactly as given. These are the
# three steps of the classic notebook (special tokens, padding, mask) without a tokenizer:

# %%
cls, love, sep, pad = tokens.input_ids[0, [0, 2, 4, 5]]
by_hand = TokenIds(input_ids=[cls, love, sep, pad], attention_mask=[1, 1, 1, 0])
print(client.decode([cls, love, sep, pad], skip_special_tokens=False))

# %% [markdown]
# ## 2. Embeddings
#
# One request brings the last hidden state, the pooler output and all hidden states, from one forward pass.

# %%
embedding = client.embed(tokens, layers="all", pooler_output=True)
embedding

# %% [markdown]
# `last_hidden_state` has a vector for each token: `[text_count, length, hidden_size]`. The first is that of `[CLS]`.

# %%
cls_vector = embedding.last_hidden_state[0, 0]
print(embedding.last_hidden_state.shape, cls_vector.shape)

# %% [markdown]
# The pooler output is one vector for the text: that of `[CLS]`, through one more layer and a tanh.

# %%
print(
    embedding.pooler_output.shape,
    "from",
    embedding.pooler_output.min().round(2),
    "to",
    embedding.pooler_output.max().round(2),
)

# %% [markdown]
# `hidden_states` holds every layer by its number: 0 is the embedding output, before any attention, and the last one is
# `last_hidden_state`.

# %%
for layer in embedding.layers:
    print(f"layer {layer}:", embedding.hidden_states[layer].shape)

# %% [markdown]
# A mask matters: with `[PAD]` masked, the other tokens are what they are without it.

# %%
masked = client.embed(by_hand).last_hidden_state[0, :3]
alone = client.embed([[cls, love, sep]]).last_hidden_state[0]
seen = client.embed([[cls, love, sep, pad]]).last_hidden_state[0, :3]
print(f"largest difference with [PAD] masked: {np.abs(masked - alone).max():.0e}")
print(f"largest difference with [PAD] seen:   {np.abs(seen - alone).max():.2f}")

# %% [markdown]
# ## 3. Pictures
#
# `layertap.plot` makes each picture with one call on an `Embedding`; `layertap.analysis` has the numbers in it, under
# the same names. `layertap explore` shows the same in the browser, for sentences as you type them.
#
# ### How does each token change?
#
# The cosine of each token's row to its own row in layer 0: 1 where the model has not moved it yet. Words leave layer by
# layer as they take up their neighbours; `[CLS]` keeps its direction to the last block.

# %%
sentence = "The bank by the river closed when the river rose."
spoken = client.embed(sentence, layers="all", attentions="all", return_tokens=True)
changes = plot.tokens_by_layers(spoken)

# %% [markdown]
# ### How alike are the tokens of a sentence?
#
# The cosine of each pair of tokens, from -1 to 1, in four layers. At first tokens are alike if they are the same word;
# layer by layer each takes up more of the whole sentence, until all have much in common.

# %%
shown = [round(part * info.layer_count / 3) for part in range(4)]
panels = plot.similarity(spoken, layers=shown)

# %% [markdown]
# ### One word, two contexts
#
# The vector of *bank* in four sentences: two by a river, two with money. In layer 0 it is the same word at some
# position, and context sets in with the first attention.

# %%
river = ["She sat on the bank of the river.", "The boat drifted to the bank of the stream."]
money = ["He paid the cash into the bank.", "She asked the bank for a loan."]
poolings = analysis.each_layer("mean", info.layer_count)
contexts = client.embed([*river, *money], layers="all", pooling=poolings, return_tokens=True)
banks = [(n, tokens.index("bank")) for n, tokens in enumerate(contexts.tokens.tokens)]
pairs = {
    "the same sense: river and river": (banks[0], banks[1]),
    "the same sense: money and money": (banks[2], banks[3]),
    "two senses: river and money": (banks[0], banks[2]),
    "two senses: money and river": (banks[3], banks[1]),
}
words = plot.token_trajectory(contexts, pairs=list(pairs.values()), labels=list(pairs))

# %% [markdown]
# The same for the sentences as wholes: the mean of all rows of a sentence, in each layer.

# %%
wholes = plot.trajectory(contexts, pairs=[(0, 1), (2, 3), (0, 2), (3, 1)])

# %% [markdown]
# And as a map: the tokens of a river and of a money sentence along the two directions in which tokens of all layers
# differ most (their principal components). The axes are the same in each layer, so that what has moved has moved.

# %%
maps = plot.projection(contexts, layers=[0, info.layer_count // 2, info.layer_count], texts=[0, 2])

# %% [markdown]
# ### Where does a token look?
#
# The attention of each layer and head: for each token (a row) how much it takes from each token (a column), which adds
# up to 1. Four heads of the last layer, of the sentence about the river. Many look at a special token, which is where a
# head looks that has nothing to add; others look at one word of the sentence from everywhere.

# %%
chosen = [round(part * (info.attention_head_count - 1) / 3) for part in range(4)]
looks = plot.attention(spoken, layer=-1, heads=chosen)

# %% [markdown]
# ## 4. A long document
#
# The model has positions for so many tokens. `windows=` lets a longer text run as windows that overlap, and answers as
# if it were one text: one row for each token. `spans=` makes a vector of each sentence out of the rows that it has in
# the whole document.

# %%
topics = [
    "Rivers carry water from the mountains to the sea.",
    "Banks lend money and pay interest on what they keep.",
    "A guitar has six strings and a hollow body.",
]
sentences = [f"{sentence} " for sentence in topics for _ in range(40)]
ends = np.cumsum([len(one) for one in sentences])
spans = np.stack([ends - [len(one) for one in sentences], ends - 1], axis=1)
long = client.embed("".join(sentences), windows=Windows(stride=128), spans=spans, layers=-1)
print(f"{long.token_counts[0]} tokens, {info.max_length} positions: {long.window_counts[0]} windows")
print(long.last_hidden_state.shape, long.spans.padded.shape)

# %% [markdown]
# The sentence nearest to a question, by the cosine of their vectors:

# %%
question = client.embed("How many strings does a guitar have?", pooling="mean").pooled[0]
vectors = long.spans.ragged()[0]
cosines = vectors @ question / np.linalg.norm(vectors, axis=1) / np.linalg.norm(question)
print(sentences[int(cosines.argmax())])

# %%
client.close()
