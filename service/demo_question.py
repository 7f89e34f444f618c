"""The question that `make demo` asks and the web page begins with: one passage of five has the answer."""

QUERY = "For what did Marie Curie receive the Nobel Prize in Chemistry in 1911?"
PASSAGES = [
    {
        "title": "Radium",
        "text": "Radium is a chemical element with the symbol Ra and atomic number 88. It was discovered in 1898 by"
        " Marie and Pierre Curie in samples of pitchblende from Jáchymov. Pure radium metal was isolated in"
        " 1910 by Marie Curie and André-Louis Debierne by electrolysis of radium chloride. All isotopes of "
        "radium are radioactive; the most stable, radium-226, has a half-life of 1,600 years. It was once "
        "used in the luminous paint of watches and dials.",
    },
    {
        "title": "Marie Curie",
        "text": "Marie Skłodowska Curie was a Polish and naturalised-French physicist and chemist. She shared the "
        "1903 Nobel Prize in Physics with her husband Pierre Curie and with Henri Becquerel for their work "
        "on radioactivity. In 1911 she received the Nobel Prize in Chemistry for the discovery of the "
        "elements polonium and radium. She was the first woman to win a Nobel Prize and the first person to"
        " win one in two different sciences.",
    },
    {
        "title": "Irène Joliot-Curie",
        "text": "Irène Joliot-Curie, the elder daughter of Marie and Pierre Curie, was a French chemist and "
        "physicist. Together with her husband Frédéric she was awarded the Nobel Prize in Chemistry in 1935"
        " for the discovery of induced radioactivity. She was one of the first three women to be members of"
        " a French government, as an undersecretary for scientific research in 1936.",
    },
    {
        "title": "Dorothy Hodgkin",
        "text": "Dorothy Crowfoot Hodgkin was a British chemist who advanced X-ray crystallography to determine the"
        " structure of biomolecules. She confirmed the structure of penicillin in 1945 and found that of "
        "vitamin B12, for which she was awarded the Nobel Prize in Chemistry in 1964. In 1969, after 35 "
        "years of work, she deciphered the structure of insulin.",
    },
    {
        "title": "Curie temperature",
        "text": "In physics and materials science, the Curie temperature is the temperature above which certain "
        "materials lose their permanent magnetic properties. It is named after Pierre Curie, who showed "
        "that magnetism is lost at a critical temperature. For iron it is 1,043 kelvin, for cobalt 1,400 "
        "kelvin and for nickel 627 kelvin.",
    },
]
