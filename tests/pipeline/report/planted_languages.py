"""Write evaluations of planted responses in thirty languages, with answers of every type, scored by the real code."""

import json
import random
from pathlib import Path

from pipeline.evaluation.dataset import read_examples
from pipeline.evaluation.progress import Generation
from pipeline.evaluation.results import write_results
from pipeline.evaluation.settings import EvaluationSettings

GROUPS = 12
# For each language, a sentence that introduces the final answer.
SENTENCES = {
    "en": "We add the numbers one after the other, and so we find the final answer",
    "de": "Wir addieren die Zahlen nacheinander und finden so die endgültige Antwort",
    "fr": "Nous additionnons les nombres les uns après les autres et trouvons la réponse finale",
    "es": "Sumamos los números uno tras otro y así encontramos la respuesta final",
    "pt": "Somamos os números um após o outro e assim encontramos a resposta final",
    "it": "Sommiamo i numeri uno dopo l'altro e così troviamo la risposta finale",
    "ru": "Мы складываем числа одно за другим и так находим окончательный ответ",
    "uk": "Ми додаємо числа одне за одним і так знаходимо остаточну відповідь",
    "tr": "Sayıları art arda topluyoruz ve böylece son cevabı buluyoruz",
    "vi": "Chúng ta cộng các số lần lượt với nhau và như vậy tìm được đáp án cuối cùng",
    "id": "Kita menjumlahkan angka-angka itu satu per satu dan menemukan jawaban akhirnya",
    "zh": "我们把这些数字一个接一个地加起来，就得到了最后的答案",
    "ja": "数字を一つずつ順番に足していくと、最後の答えが求められます",
    "ko": "숫자를 하나씩 차례대로 더하면 마지막 답을 구할 수 있습니다",
    "th": "เราบวกตัวเลขทีละตัวแล้วจึงได้คำตอบสุดท้าย",
    "hi": "हम संख्याओं को एक के बाद एक जोड़ते हैं और इस तरह अंतिम उत्तर पाते हैं",
    "bn": "আমরা সংখ্যাগুলো একের পর এক যোগ করি এবং এভাবে শেষ উত্তর পাই",
    "te": "మనం సంఖ్యలను ఒకదాని తర్వాత ఒకటి కలిపి చివరి సమాధానం పొందుతాము",
    "ta": "எண்களை ஒன்றன் பின் ஒன்றாகக் கூட்டி இறுதி விடையைக் காண்கிறோம்",
    "ar": "نجمع الأعداد واحدا بعد الآخر وهكذا نجد الجواب النهائي",
    "fa": "ما اعداد را یکی پس از دیگری جمع می‌کنیم و به این ترتیب پاسخ نهایی را پیدا می‌کنیم",
    "ur": "ہم اعداد کو ایک کے بعد ایک جمع کرتے ہیں اور اس طرح آخری جواب پاتے ہیں",
    "sw": "Tunajumlisha nambari moja baada ya nyingine na hivyo tunapata jibu la mwisho",
    "yo": "A ń ṣe àròpọ̀ àwọn nọ́ńbà náà lọ́kọ̀ọ̀kan, a sì rí ìdáhùn ìkẹyìn",
    "ha": "Muna tara lambobin daya bayan daya kuma ta haka muke samun amsar karshe",
    "zu": "Sihlanganisa izinombolo ngayinye ngayinye bese sithola impendulo yokugcina",
    "am": "ቁጥሮቹን አንዱን ከሌላው በኋላ እንደምራለን እናም የመጨረሻውን መልስ እናገኛለን",
    "my": "ကျွန်ုပ်တို့သည် ဂဏန်းများကို တစ်ခုပြီးတစ်ခု ပေါင်းပြီး နောက်ဆုံးအဖြေကို ရရှိသည်",
    "vai": "ꕉꕒ ꖕꕉ ꕪꗏ ꖷꔤꘋ ꕇꕉ ꔳꕮꖏ",
    "zgh_Tfng": "ⵏⵙⵎⵓⵏ ⵉⵎⴹⴰⵏ ⵢⴰⵏ ⴹⴰⵔⵜ ⵡⴰⵢⴹ ⴰⵔ ⴷ ⵏⴰⴼ ⵜⴰⵎⵔⴰⵔⵓⵜ",
}
TYPES = ("number", "number", "expression", "choice", "text", "number")
LOW_RESOURCE = list(SENTENCES)[22:]


def write_test_file(path: Path) -> None:
    """Write 12 example groups in 30 languages, with all answer types."""
    records = []
    for group in range(GROUPS):
        kind = TYPES[group % len(TYPES)]
        for lang in SENTENCES:
            gold = _gold(group, lang)
            record = {"pair_id": f"q{group:02}", "lang": lang, "question": "?", "gold": gold, "answer_type": kind}
            records.append(record | ({"choices": ["10", "20", "30", "40"]} if kind == "choice" else {}))
    write = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(write), encoding="utf-8")


def write_evaluation(output: Path, data: Path, low_resource_accuracy: float, seed: int) -> Path:
    """Write the three result files of a planted model.

    Args:
        output: the output directory.
        data: the file of `write_test_file`.
        low_resource_accuracy: its accuracy in the low-resource languages; in the others it is 0.8.
        seed: random seed of the responses.
    """
    output.mkdir()
    examples, generator = read_examples(data), random.Random(seed)
    generations = []
    for example in examples:
        low = example.lang in LOW_RESOURCE
        answer: object = example.gold
        if generator.random() > (low_resource_accuracy if low else 0.8):
            wrong = {"number": (8, 9), "expression": ("1/9", "x+1"), "choice": ("C", "D"), "text": ("8", "9")}
            answer = generator.choice(wrong[example.answer_type])
        spoken = "en" if low and generator.random() < 0.7 - low_resource_accuracy else example.lang
        finished = not (low and generator.random() < 0.08)
        text = SENTENCES[spoken] + rf": \boxed{{{answer}}}"
        generations.append(Generation(text, finished, len(text) // (1 if low else 3)))
    model = {"dtype": "bfloat16", "fingerprint": output.name, "export": None}
    write_results(EvaluationSettings(f"{output.name}/hf", data.name), model, output, examples, generations)
    return output


def _gold(group: int, lang: str) -> object:
    kind = TYPES[group % len(TYPES)]
    if kind == "text":  # a translation
        return SENTENCES[lang].split()[-1]
    return {"number": 12 + group, "expression": rf"\frac{{{group}}}{{7}}", "choice": "B"}[kind]
