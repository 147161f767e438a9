# %% [markdown]
# # Every layer of a BERT, in numpy
#
# The two halves of the classic notebook on BERT embeddings, without a model in this process: a `layertap-server` holds
# it and hands out what is asked for. Start one beside this notebook (`make serve` in a checkout, or
# `layertap-server --model-id bert-base-uncased`), and run the cells.
#
# 1. **Tokens**: `[CLS]`, `[SEP]`, `[PAD]`, ids and the attention mask.
# 2. **Embeddings**: the last hidden state, the pooler output, all hidden states.
# 3. **Pictures**: how alike the tokens of a sentence are in each layer, how the vectors of one word part ways in two
#    contexts, and where each token looks.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np

from layertap import Client, TokenIds

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
# ### How alike are the tokens of a sentence?
#
# The cosine of each pair of tokens, from -1 to 1, in four layers. At first tokens are alike if they are the same word;
# layer by layer each takes up more of the whole sentence, until all have much in common.


# %%
def cosines(rows, others):
    """Returns the cosine of each row with each other row. Shape: [row_count, other_count]."""
    rows, others = (array / np.linalg.norm(array, axis=-1, keepdims=True) for array in (rows, others))
    return rows @ others.T


sentence = "The bank by the river closed when the river rose."
spoken = client.embed(sentence, layers="all", return_tokens=True)
pieces = spoken.tokens.tokens[0]
shown = [round(part * info.layer_count / 3) for part in range(4)]
figure, axes = plt.subplots(1, 4, figsize=(13, 3.8), sharey=True, layout="constrained")
for axis, layer in zip(axes, shown, strict=True):
    rows = spoken.ragged(layer)[0]
    image = axis.imshow(cosines(rows, rows), vmin=-1, vmax=1, cmap="RdBu_r")
    axis.set_title(f"layer {layer}")
    axis.set_xticks(range(len(pieces)), pieces, rotation=90)
    axis.set_yticks(range(len(pieces)), pieces)
bar = figure.colorbar(image, ax=axes, label="cosine (blue: below 0)")

# %% [markdown]
# ### One word, two contexts
#
# The vector of *bank* in four sentences: two by a river, two with money. In layer 0 it is the same word at some
# position, and context sets in with the first attention.

# %%
river = ["She sat on the bank of the river.", "The boat drifted to the bank of the stream."]
money = ["He paid the cash into the bank.", "She asked the bank for a loan."]
contexts = client.embed([*river, *money], layers="all", return_tokens=True)
places = [text.index("bank") for text in contexts.tokens.tokens]
# The path of the word through the layers, in each sentence. Shape: [text_count, layers, hidden_size].
paths = np.stack([[contexts.ragged(layer)[n][place] for layer in contexts.layers] for n, place in enumerate(places)])

alike = np.stack([cosines(paths[:, layer], paths[:, layer]) for layer in contexts.layers])
one_sense = (alike[:, 0, 1] + alike[:, 2, 3]) / 2
two_senses = alike[:, :2, 2:].mean((1, 2))
figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
axis.plot(contexts.layers, one_sense, "o-", label="the same sense: river and river, money and money")
axis.plot(contexts.layers, two_senses, "s-", label="two senses: river and money")
axis.set(xlabel="layer", ylabel='cosine of "bank" and "bank"', xticks=contexts.layers)
legend = figure.legend(loc="outside lower center")

# %% [markdown]
# The same as a map. What the four vectors of a layer have in common is taken away; what is left is shown along the two
# directions in which it differs most (its principal components). Along the first of them all paths start in the middle:
# in layer 0 nothing but the place in the sentence sets them apart. Then the rivers go one way, and the money the other.

# %%
apart = paths - paths.mean(0)
_, _, directions = np.linalg.svd(apart.reshape(-1, info.hidden_size), full_matrices=False)
points = apart @ directions[:2].T
figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
for path, text, style in zip(points, [*river, *money], ["o-", "o--", "s-", "s--"], strict=True):
    axis.plot(*path.T, style, color="tab:blue" if text in river else "tab:orange", label=text)
# Rings in place of labels, which would cover lines.
for layer, size in ((0, 90), (info.layer_count, 260)):
    axis.scatter(*points[:, layer].T, s=size, facecolors="none", edgecolors="black", label=f"layer {layer}")
axis.set(xlabel="first principal component", ylabel="second principal component")
legend = figure.legend(fontsize="small", loc="outside lower center", ncols=2)

# %% [markdown]
# ### Where does a token look?
#
# The attention of each layer and head: for each token (a row) how much it takes from each token (a column), which adds
# up to 1. Four heads of the last layer, of the sentence about the river. Many look at a special token, which is where a
# head looks that has nothing to add; others look at one word of the sentence from everywhere.

# %%
attended = client.embed(sentence, attentions="all")
heads = attended.attentions[-1][0]
chosen = [round(part * (len(heads) - 1) / 3) for part in range(4)]
figure, axes = plt.subplots(1, 4, figsize=(13, 3.8), sharey=True, layout="constrained")
for axis, head in zip(axes, chosen, strict=True):
    looks = axis.imshow(heads[head], vmin=0, vmax=1, cmap="Blues")
    axis.set_title(f"layer {info.layer_count - 1}, head {head}")
    axis.set_xticks(range(len(pieces)), pieces, rotation=90)
    axis.set_yticks(range(len(pieces)), pieces)
bar = figure.colorbar(looks, ax=axes, label="attention")

# %%
client.close()
