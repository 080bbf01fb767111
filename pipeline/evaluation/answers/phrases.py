"""Phrases that announce an answer, by language: "The answer is 8", "答えは8です"."""

from typing import NamedTuple


class Phrase(NamedTuple):
    """Regular expressions for the sentence that states an answer.

    Attributes:
        noun: the word for "answer".
        copula: the words that may connect it to an answer that follows.
        after: the words that may follow the answer and end the sentence, in verb-final languages.
    """

    noun: str
    copula: str
    after: str = ""


NEVER = r"(?!)"

# Languages whose numbers and phrases were written and tested by hand, on recorded outputs where there are any.
HAND_WRITTEN = {
    "bn": Phrase(r"উত্তর(?:টি|টা)?", r"হলো|হল(?!ে)|হবে|হচ্ছে|হয়|হ'ল"),
    "de": Phrase(r"\b(?:Antwort|Lösung|Ergebnis)\b", r"\b(?:ist|lautet|beträgt|wäre)\b"),
    "en": Phrase(r"\banswers?\b", r"\b(?:is|are|was|equals|will be|would be)\b"),
    "es": Phrase(r"\b(?:respuesta|resultado)\b", r"\b(?:es|son|será|sería)\b"),
    "fr": Phrase(r"\b(?:r[ée]ponse|r[ée]sultat)\b", r"\b(?:est|sont|sera|serait|vaut)\b"),
    "ja": Phrase(r"答え|解答|回答|正解", r"は、?", r"です|である|だ|になります|となります"),
    "ru": Phrase(r"\bответ(?:ом)?\b", r"\b(?:будет|равен|это|является|составляет|составит)\b"),
    "sw": Phrase(r"\b(?:jibu|majibu)\b", r"\b(?:ni|litakuwa|itakuwa)\b"),
    "te": Phrase(r"సమాధానం|జవాబు", r"ఏమిటంటే|అవుతుంది", r"అవుతుంది"),
    "th": Phrase(r"คำตอบ", r"คือ|เท่ากับ|เป็น"),
    "zh": Phrase(r"答案|答(?=[:是为])", r"是|就是|为|為|等于|等於"),
}

# Languages whose numbers follow CLDR.
OTHERS = {
    "af": Phrase(r"\bantwoord\b", r"\bis\b"),
    "ak": Phrase(r"\b(?:mmuae[ɛe]?|nnyiano|anyiano)\b", r"\b(?:ne|yɛ|ye)\b"),
    "am": Phrase(r"መልሱም?|መልስ(?:ዎ|ህ)?", r"የሚሆነው|ነው", r"ነው|ናቸው|ይሆናል"),
    "ar": Phrase(
        r"(?:ال)?(?:[إا]جابة|جواب|ناتج)(?: النهائية| النهائي| الصحيحة| الصحيح)?",
        r"\b(?:هي|هو|تساوي|يساوي|ستكون|سيكون|تكون|يكون)\b",
    ),
    "az": Phrase(r"\bcavab\b", NEVER, r"-?d[ıiuü]r"),
    "bg": Phrase(r"\bотговор(?:ът|а)?\b", r"\bе\b"),
    "ca": Phrase(r"\bresposta\b", r"\b(?:és|són)\b"),
    "ceb": Phrase(r"\btubag\b", r"\b(?:mao ang|kay)\b"),
    "cs": Phrase(r"\b(?:odpověď|výsledek)\b", r"\bje\b"),
    "da": Phrase(r"\b(?:svaret|svar)\b", r"\ber\b"),
    "ee": Phrase(r"ŋuɖoɖo(?:ae|a)?(?: la)?", r"\b(?:nye|enye)\b"),
    "el": Phrase(r"\bαπάντηση\b", r"\bείναι\b"),
    "eu": Phrase(r"\berantzuna\b", NEVER, r"\bda\b"),
    "fa": Phrase(
        r"(?:پاسخ|جواب)(?: نها[یي][یي]| درست| صحیح)?",
        r"برابر(?: است)? با|برابرست با|عبارت است از|این است که",
        r"است|می ?شود|خواهد بود|هستند",
    ),
    "fi": Phrase(r"\bvastaus\b", r"\bon\b"),
    "fil": Phrase(r"\b(?:sagot|kasagutan)\b", r"\bay\b"),
    "gl": Phrase(r"\bresposta\b", r"\b(?:é|son)\b"),
    "gu": Phrase(r"જવાબ|ઉત્તર", NEVER, r"છે|થશે"),
    "ha": Phrase(r"\bamsar?\b", r"\b(?:ita ce|itace|shi ne|shine|ce|ne)\b"),
    "he": Phrase(r"תשובה", r"היא|הוא"),
    "hi": Phrase(r"उत्तर|जवाब", r"(?:है|होगा|होगी|हैं)(?!\s*[।.])", r"है|हैं|होगा|होगी|होंगे"),
    "ht": Phrase(r"\brepons(?: lan| la)?\b", r"\bse\b"),
    "hu": Phrase(r"\b(?:válasz|eredmény)\b", NEVER),
    "hy": Phrase(r"պատասխան[նը]?", NEVER, r"է"),
    "id": Phrase(r"\b(?:jawaban(?:nya)?|hasil akhir(?:nya)?)\b", r"\b(?:adalah|ialah|yaitu|yakni)\b"),
    "ig": Phrase(r"\b(?:az[ịi]za|[ọo]s[ịi]sa)\b", r"\bb[ụu]\b"),
    "it": Phrase(r"\b(?:risposta|risultato)\b", r"\b(?:è|sono|sarà|sarebbe)\b"),
    "jv": Phrase(r"\b(?:jawaban(?:e|ipun)?|wangsulan(?:e)?)\b", r"\b(?:yaiku|iku|inggih menika)\b"),
    "ka": Phrase(r"პასუხი", NEVER, r"არის|ა"),
    "kk": Phrase(r"\b(?:жауап|жауабы)\b", NEVER),
    "km": Phrase(r"ចម្លើយ", r"គឺ"),
    "kn": Phrase(r"ಉತ್ತರ", r"ಏನೆಂದರೆ", r"ಆಗಿದೆ"),
    "ko": Phrase(r"(?:정|해)?답(?![을하변])", r"은|는", r"입니다|이다|이에요|예요|임"),
    "ky": Phrase(r"\b(?:жооп|жообу)\b", NEVER),
    "lg": Phrase(r"\b(?:eky['’]?okuddamu|okuddamu|ansa)\b", r"\b(?:kiri|kye|kyali|ye|eri)\b"),
    "ln": Phrase(r"\b(?:eyano|biyano)\b", r"\b(?:ezali|ekozala)\b"),
    "lo": Phrase(r"ຄຳຕອບ|ຄໍາຕອບ", r"ແມ່ນ|ຄື"),
    "mg": Phrase(r"\bvaliny\b", r"\bdia\b"),
    "ml": Phrase(r"ഉത്തരം", NEVER, r"ആണ്"),
    "mn": Phrase(r"\bхариулт\b", r"\b(?:нь|бол)\b"),
    "mr": Phrase(r"उत्तर", NEVER, r"आहे|आहेत|होय"),
    "ms": Phrase(r"\bjawapan(?:nya)?\b", r"\b(?:ialah|adalah|iaitu)\b"),
    "my": Phrase(r"အဖြေ", r"မှာ|သည်|က"),
    "nb": Phrase(r"\b(?:svaret|svar)\b", r"\ber\b"),
    "ne": Phrase(r"उत्तर|जवाफ", NEVER, r"हो|हुन्छ|हुनेछ"),
    "nl": Phrase(r"\bantwoord\b", r"\b(?:is|luidt)\b"),
    "nso": Phrase(r"\bkarabo\b", r"\bke\b"),
    "ny": Phrase(r"\byankho\b", r"\b(?:ndi|ndilo)\b"),
    "om": Phrase(r"\bdeebii?n?(?: isaa| sirrii)?\b", NEVER, r"\b(?:dha|ta['’]a)\b"),
    "pa": Phrase(r"ਜਵਾਬ|ਉੱਤਰ", NEVER, r"ਹੈ|ਹਨ|ਹੋਵੇਗਾ"),
    "pl": Phrase(r"\b(?:odpowiedź|odpowiedzią|wynik)\b", r"\b(?:to|jest|wynosi|brzmi)\b"),
    "ps": Phrase(r"ځواب", NEVER, r"دی"),
    "pt": Phrase(r"\b(?:resposta|resultado)\b", r"\b(?:é|são|será|seria)\b"),
    "ro": Phrase(r"\b(?:răspuns(?:ul)?|rezultat(?:ul)?)\b", r"\b(?:este|e|sunt)\b"),
    "rw": Phrase(r"\bigisubizo\b", r"\b(?:ni|kiba|kizaba|kingana na)\b"),
    "sd": Phrase(r"جواب", NEVER, r"آهي"),
    "si": Phrase(r"පිළිතුර", r"වන්නේ", r"වේ"),
    "sk": Phrase(r"\b(?:odpoveď|výsledok)\b", r"\bje\b"),
    "sn": Phrase(r"\bmhinduro\b", r"\b(?:ndeye|ndi|inoti|i)\b"),
    "so": Phrase(r"\bjawaab(?:t[au])?\b", r"\b(?:waa|waxay tahay)\b"),
    "sr": Phrase(r"\b(?:одговор|odgovor)\b", r"\b(?:је|je)\b"),
    "st": Phrase(r"\bkarabo\b", r"\b(?:ke|e tla ba)\b"),
    "sv": Phrase(r"\b(?:svaret|svar)\b", r"\bär\b"),
    "ta": Phrase(r"பதில்|விடை", NEVER, r"ஆகும்"),
    "ti": Phrase(r"መልሲ|መልሱ", NEVER, r"እዩ"),
    "tn": Phrase(r"\bkarabo\b", r"\bke\b"),
    "tr": Phrase(r"\b(?:cevap|cevabı|yanıt|yanıtı|sonuç)\b", r"\b(?:şudur|eşittir)\b", r"'?[dt][ıiuü]r"),
    "uk": Phrase(r"\bвідповідь\b", r"\b(?:це|дорівнює|становить|буде)\b"),
    "ur": Phrase(r"جواب", r"(?:یہ )?(?:ہے|ہوگا)(?!\s*[۔.])", r"ہے|ہیں|ہوگا|ہوں گے"),
    "uz": Phrase(r"\bjavob(?:i)?\b", NEVER),
    "vi": Phrase(r"(?:câu )?trả lời|đáp án|đáp số|kết quả", r"sẽ là|là|bằng"),
    "wo": Phrase(r"\b(?:tontu|tont)(?: bi| li)?\b", r"\b(?:mooy|moo di)\b"),
    "xh": Phrase(r"\bimpendulo\b", r"\b(?:ithi|ngu|ngama|yi|iyi|zi|si|li|lu)\b-?"),
    "yo": Phrase(r"\b[ìi]d[áa]h[ùu]n\b", r"\bni\b|\bj[ẹe]\u0301?"),
    "yue": Phrase(r"答案|答(?=[:係是])", r"就係|係|是|等於"),
    "zu": Phrase(r"\bimpendulo\b", r"\b(?:ithi|ngu|ingu|yi|iyi|iwu|wu|zi)\b-?"),
}
PHRASES = HAND_WRITTEN | OTHERS | {"nn": OTHERS["nb"], "no": OTHERS["nb"]}  # Norwegian
