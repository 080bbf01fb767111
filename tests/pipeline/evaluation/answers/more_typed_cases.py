"""More hand-written responses whose answers are expressions and choices, in the form of `typed_cases`."""

COLUMN, MATRIX = r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"
ARRAY, CASES = r"\left(\begin{array}{cc}1&2\\3&4\end{array}\right)", r"\begin{cases}x=1\\y=2\end{cases}"

# (language, response, gold, whether the response is right)
EXPRESSIONS = [
    ("en", rf"\boxed{{{COLUMN}}}", COLUMN, True),
    ("en", r"\boxed{\begin{bmatrix} 1 \\ 2 \end{bmatrix}}", COLUMN, True),
    ("en", r"\boxed{\begin{pmatrix}1\\3\end{pmatrix}}", COLUMN, False),
    ("de", rf"Die Antwort ist ${ARRAY}$.", MATRIX, True),
    ("zh", rf"答案是${MATRIX}$。", ARRAY, True),
    ("es", rf"\boxed{{{CASES}}}", CASES, True),
]
