"""Reasoning: what a model writes for itself before it answers.

A *format* (`ReasoningFormat`) says between which markers a family of models reasons, and
`choose_reasoning` knows from the chat template which one a model uses. Whether an answer begins
with reasoning depends on how the prompt ends, because templates may write the marker themselves
(`Beginning`).

    support = ReasoningSupport(tokenizer, template)
    beginning = support.beginning(prompt)
    reader = support.reader(beginning, inner=CallReader())
    for piece in pieces:
        for event in reader.push(piece):     # Reasoning, then what the inner reader finds
            ...
"""
