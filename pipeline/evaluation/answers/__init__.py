"""Gold answers and the answers in responses: numbers, expressions, choices and short texts, in any language."""
