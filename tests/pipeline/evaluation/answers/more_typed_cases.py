"""More hand-written responses whose answers are expressions and choices, in the form of `typed_cases`."""

from tests.pipeline.evaluation.answers.typed_cases import CAPITALS

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
    # Plain formulas before a copula or another word.
    ("ja", "答えはx^2+1です。", "x^2+1", True),
    ("ko", "정답은 x^2+1입니다.", "x^2+1", True),
    ("hi", "उत्तर x^2+1 है।", "x^2+1", True),
    ("tr", "Cevap x^2+1'dir.", "x^2+1", True),
    ("ja", "答えは(1,2)です。", "(1,2)", True),
    ("ko", "정답은 (1,2)입니다.", "(1,2)", True),
    ("te", "సమాధానం: (1,2) అవుతుంది.", "(1,2)", True),
    ("fa", "پاسخ (1,2) است.", "(1,2)", True),
    ("ta", "விடை (1,2) ஆகும்.", "(1,2)", True),
    ("th", "คำตอบคือ (1,2) ครับ", "(1,2)", True),
    ("fr", "La réponse est (1, 2) unités.", "(1,2)", True),
    ("en", "The answer is (1,2) units.", "(1,2)", True),
    ("en", "The answer is [0, 5) hours.", "[0,5)", True),
    ("en", "The answer is (1,200) dollars.", "1200", True),
    ("ja", "答えは18 - 10 = 8です。", "8", True),
    # Amounts of dollars beside formulas.
    ("en", "So Tom pays $12 and Ann pays $16, hence the ratio is 3/4", "3/4", True),
    ("en", r"It costs \$12 and then \$16. The ratio is 3/4", "3/4", True),
    ("en", "The answer is $12, and Ann pays $16.", "12", True),
    ("en", "He pays $5 or $10, so 1/2", "1/2", True),
    ("en", "Tom pays $12. Then $x = 3$ holds.", "3", True),
    ("es", "Tom paga $12 y Ana paga $16, la razón es 3/4", "3/4", True),
    ("de", "Tom zahlt $12 und Anna zahlt $16, also 3/4", "3/4", True),
    ("ha", "Tana samun 9 * $2 = $18 kowace rana.", "18", True),
    ("en", "So $AB + CD$", "AB+CD", True),
    ("en", r"So $3 \text{ cm}^2$ and then $3 \text{ or } 4$.", r"\{3, 4\}", True),
]

SEOUL = ("서울", "부산", "대구", "인천")
BEIJING = ("北京", "上海", "广州", "深圳")
BANGKOK = ("กรุงเทพ", "เชียงใหม่", "ภูเก็ต", "ขอนแก่น")
TOKYO = ("東京", "大阪", "京都", "札幌")
CAIRO = ("القاهرة", "بغداد", "دمشق", "عمان")
TEHRAN = ("تهران", "شیراز", "تبریز", "اصفهان")
DELHI = ("मुंबई", "दिल्ली", "कोलकाता", "चेन्नई")
NUMBERS = ("2", "3", "4", "5")
# (language, options, response, letter or None)
CHOICES = [
    # "The correct option is C".
    ("zh", BEIJING, "正确的选项是C。", "C"),
    ("zh", BEIJING, "因此，正确选项为C。", "C"),
    ("zh", BEIJING, "选B", "B"),
    ("zh", BEIJING, "答案选C。", "C"),
    ("ko", SEOUL, "선택지 중에서 가장 적절한 것은 B입니다.", "B"),
    ("th", BANGKOK, "ตัวเลือกที่ถูกต้องคือ B", "B"),
    ("th", BANGKOK, "ตอบ ข", "B"),
    ("ja", TOKYO, "正しい選択肢はCです。", "C"),
    ("ar", CAIRO, "الخيار الصحيح هو ج", "C"),
    ("bn", CAPITALS, "সঠিক বিকল্প হলো C", "C"),
    ("hi", DELHI, "सही विकल्प है C", "C"),
    ("it", CAPITALS, "L'opzione corretta è C", "C"),
    ("uk", CAPITALS, "Правильний варіант це C.", "C"),
    ("nl", CAPITALS, "De juiste optie is C.", "C"),
    ("pl", CAPITALS, "Poprawna opcja to C.", "C"),
    ("el", CAPITALS, "Η σωστή επιλογή είναι C.", "C"),
    ("he", CAPITALS, "האפשרות הנכונה היא C.", "C"),
    ("ha", CAPITALS, "Zaɓi daidai shi ne C.", "C"),
    # Words that begin with the letter of an option, before a letter with marks.
    ("vi", CAPITALS, "Đáp án của câu hỏi này là B.", "B"),
    ("vi", CAPITALS, "Câu trả lời cần chọn là C. Vì vậy.", "C"),
    ("ig", CAPITALS, "Azịza bụ B.", "B"),
    # Articles and prepositions of one letter.
    ("es", CAPITALS, "La respuesta a la pregunta es B.", "B"),
    ("es", CAPITALS, "La respuesta a esta pregunta es: c)", "C"),
    ("pt", CAPITALS, "A resposta a esta pergunta é B.", "B"),
    ("pt", CAPITALS, "A resposta correta é a B.", "B"),
    ("pt", CAPITALS, "A resposta correta é a c), Dodoma.", "C"),
    ("el", CAPITALS, "Η απάντηση είναι το Γ.", "C"),
    ("el", CAPITALS, "Η σωστή απάντηση είναι η Β.", "B"),
    ("en", CAPITALS, "The answer a student gives is C.", "C"),
    ("en", CAPITALS, "The answer is (a city) in Kenya.", None),
    # The place of an option, or the number in its text.
    ("en", CAPITALS, "The answer is Option 3.", "C"),
    ("es", CAPITALS, "La respuesta es la opción 3.", "C"),
    ("fr", CAPITALS, "La réponse est l'option 2.", "B"),
    ("vi", CAPITALS, "Đáp án đúng là phương án 3.", "C"),
    ("tr", CAPITALS, "Cevap 3'tür.", "C"),
    ("fa", TEHRAN, "پاسخ صحیح گزینه ۳ است.", "C"),
    ("th", BANGKOK, "คำตอบคือ ข้อ 2", "B"),
    ("ja", TOKYO, "正解は3です。", "C"),
    ("ja", NUMBERS, "正解は3です。", "B"),
    ("ko", SEOUL, "정답은 3입니다.", "C"),
    ("ko", NUMBERS, "정답은 3입니다.", "B"),
    ("ko", NUMBERS, "정답은 3번입니다.", "C"),
    ("ko", SEOUL, "3번", "C"),
    ("ko", SEOUL, "정답은 7번입니다.", None),
    ("en", ("3 apples", "5 apples", "7 apples"), "The answer is 3.", "A"),
    ("en", ("3 apples", "3 pears", "7 apples"), "The answer is 3.", None),
    # Why the other options are wrong, after the answer.
    ("en", CAPITALS, "The correct answer is B. Option A is incorrect because Nairobi is in Kenya.", "B"),
    ("en", CAPITALS, "The answer is B.\n\n- Option A: Nairobi is in Kenya.\n- Option C: Dodoma is in Tanzania.", "B"),
    ("en", CAPITALS, "B. Kampala\n\nOption A is incorrect because Nairobi is in Kenya.", "B"),
    ("en", CAPITALS, "B\n\nOption A is incorrect.\nOption C is incorrect.", "B"),
    ("en", CAPITALS, "A. Nairobi\nB. Kampala\nOption B is correct.", "B"),
    ("en", CAPITALS, "A. Nairobi\n\nThis was wrong. The answer is B.", "B"),
    ("en", CAPITALS, "Option A is wrong. The correct option is C.", "C"),
    ("de", CAPITALS, "Die richtige Antwort ist B. Option A ist falsch.", "B"),
    ("fr", CAPITALS, "La bonne réponse est B. L'option A est incorrecte.", "B"),
    ("es", CAPITALS, "La respuesta correcta es B. La opción A es incorrecta.", "B"),
    ("ru", CAPITALS, "Правильный ответ: Б. Вариант А неверен.", "B"),
    ("hi", DELHI, "सही उत्तर B है। विकल्प A गलत है।", "B"),
    ("ar", CAIRO, "الإجابة الصحيحة هي ب. الخيار أ غير صحيح.", "B"),
    ("zh", BEIJING, "正确答案是B。选项A是错误的。", "B"),
    ("zh", BEIJING, "如果答案是A，那么不对。所以选B", "B"),
    ("ja", TOKYO, "正解はBです。選択肢Aは間違いです。", "B"),
    ("ko", SEOUL, "정답은 B입니다. 선택지 A는 틀렸습니다.", "B"),
    ("th", BANGKOK, "คำตอบคือ ข ข้อ ก ผิด", "B"),
    ("sw", CAPITALS, "Jibu sahihi ni B. Chaguo A si sahihi.", "B"),
    ("en", CAPITALS, "The correct answer is B. Answer A is wrong because Nairobi is in Kenya.", "B"),
    ("en", CAPITALS, "The correct answer is B. Answer choice A is wrong because Nairobi is in Kenya.", "B"),
    ("en", CAPITALS, "Answer B", "B"),
    ("de", CAPITALS, "Die richtige Antwort ist B. Antwort A ist falsch.", "B"),
    ("de", CAPITALS, "Antwort B ist richtig.", "B"),
    ("fr", CAPITALS, "La bonne réponse est B. La réponse A est incorrecte.", "B"),
    ("es", CAPITALS, "La respuesta correcta es B. La respuesta A es incorrecta.", "B"),
    ("it", CAPITALS, "La risposta corretta è B. La risposta A è sbagliata.", "B"),
    ("ru", CAPITALS, "Правильный ответ — Б. Ответ А неверен.", "B"),
    ("vi", CAPITALS, "Đáp án đúng là C. Đáp án A sai.", "C"),
    ("vi", CAPITALS, "Chọn đáp án B", "B"),
    ("id", CAPITALS, "Jawaban yang benar adalah B. Jawaban A salah.", "B"),
    ("zh", BEIJING, "正确答案是B。答案A是错误的。", "B"),
    ("zh", BEIJING, "答案B", "B"),
    ("ar", CAIRO, "الإجابة الصحيحة هي ب. الإجابة أ خاطئة.", "B"),
    ("th", BANGKOK, "คำตอบ ข", "B"),
    # Other options, and lists of them.
    ("en", CAPITALS, "The answer is B. The other option was Nairobi.", "B"),
    ("zh", BEIJING, "答案是B。其他选项是北京、广州和深圳，都不对。", "B"),
    ("ja", TOKYO, "正解はBです。他の選択肢は東京のように間違いです。", "B"),
    ("zh", BEIJING, "不选A。正确答案是B。", "B"),
    ("zh", BEIJING, "选项是A、B、C、D。", None),
    ("ja", TOKYO, "選択肢はA、B、C、Dです。", None),
    ("ko", SEOUL, "선택지는 A, B, C, D입니다.", None),
    ("ar", CAIRO, "الخيارات هي أ، ب، ج", None),
    ("hi", DELHI, "विकल्प हैं A, B, C और D", None),
]
